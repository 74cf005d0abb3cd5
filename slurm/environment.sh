# Sourced by every script here, from the repository's root: the site's profile, modules, and the virtual environment.
# shellcheck shell=bash
site="${NANOCHAT_SITE:-generic}"
[[ "$site" == *.env ]] || site="slurm/$site.env"
[[ -f "$site" ]] || { echo "there is no site profile $site; copy slurm/generic.env" >&2; return 1; }
chosen_base="${NANOCHAT_BASE_DIR:-}" chosen_account="${NANOCHAT_ACCOUNT:-}"
# shellcheck disable=SC1090
source "$site"
if [[ -z "$chosen_account" && -f .env.local ]]; then
    chosen_account="$(sed -n "s/^\(export \)\{0,1\}NANOCHAT_ACCOUNT=//p" .env.local | tr -d "\"' ")"
fi
NANOCHAT_ACCOUNT="${chosen_account:-${NANOCHAT_ACCOUNT:-}}"
if [[ -n "${NANOCHAT_MODULES:-}" ]]; then
    type module > /dev/null 2>&1 || { echo "the profile $site names modules, and there is no module command" >&2; return 1; }
    # module is a function of the site: it may read variables that are not set, and fail without a word
    nounset="$(set +o | grep nounset)" loaded=0
    set +o nounset
    # shellcheck disable=SC2086
    module load $NANOCHAT_MODULES || loaded=$?
    $nounset
    ((loaded == 0)) || { echo "module load $NANOCHAT_MODULES failed with status $loaded; module avail lists what there is" >&2; return 1; }
fi
if [[ -n "${NANOCHAT_SCRATCH:-}" ]]; then
    NANOCHAT_VENV="${NANOCHAT_VENV:-$NANOCHAT_SCRATCH/nanochat-venv}"
    NANOCHAT_BASE_DIR="${chosen_base:-$NANOCHAT_SCRATCH/nanochat-cache}"
    export NANOCHAT_BASE_DIR
fi
if [[ -n "${NANOCHAT_SCRATCH:-}" ]]; then # the home directory of such a site is small, and caches would fill it
    export PIP_CACHE_DIR="${PIP_CACHE_DIR:-$NANOCHAT_SCRATCH/.cache/pip}"
    export HF_HOME="${HF_HOME:-$NANOCHAT_SCRATCH/.cache/huggingface}"
    export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$NANOCHAT_SCRATCH/.cache/triton}"
    export CUDA_CACHE_PATH="${CUDA_CACHE_PATH:-$NANOCHAT_SCRATCH/.cache/cuda}"
    export MPLCONFIGDIR="${MPLCONFIGDIR:-$NANOCHAT_SCRATCH/.cache/matplotlib}"
fi
export NANOCHAT_VENV="${NANOCHAT_VENV:-$PWD/.venv}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONUNBUFFERED=1
export PATH="$NANOCHAT_VENV/bin:$PATH"
need_nanochat() {
    [[ -x "$NANOCHAT_VENV/bin/nanochat" ]] || { echo "nanochat is not installed in $NANOCHAT_VENV; run slurm/setup.sh first" >&2; return 1; }
}
