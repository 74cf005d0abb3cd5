#!/usr/bin/env bash
# The GPU tier under compute-sanitizer: stray accesses, races in shared memory, reads of memory that nothing wrote.
# Needs a GPU and compute-sanitizer on the PATH (it comes with the CUDA toolkit). Takes some minutes;
# TOOLS=racecheck runs only that.
set -Eeuo pipefail
cd "$(dirname "$0")/../.."
command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not on the PATH; load the CUDA toolkit" >&2; exit 1; }
PYTHON=${PYTHON:-.venv/bin/python}
# the caching allocator would hide stray accesses inside its blocks; the properties' many examples add no new code paths
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in ${TOOLS:-memcheck racecheck initcheck}; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        "$PYTHON" -m pytest tests/kernels -q -p no:cacheprovider \
        -k "model_widths or narrow or saturated or offset or ignored or outside or triangle or feeds or steps_and"
done
