# Sourced by every script here, from the repository's root: the site's profile, modules, and the virtual environment.
# shellcheck shell=bash
site_settings="$(bash slurm/profile.sh "${NANOCHAT_SITE:-generic}")" || return 1
while IFS= read -r setting; do printf -v "${setting%%=*}" %s "${setting#*=}"; done <<< "$site_settings"
if [[ -n "$NANOCHAT_MODULES" ]]; then
    type module > /dev/null 2>&1 || { echo "the profile of ${NANOCHAT_SITE:-generic} names modules, and there is no module command" >&2; return 1; }
    # module is a function of the site: it may read variables that are not set, and fail without a word
    nounset="$(set +o | grep nounset)" loaded=0
    set +o nounset
    # shellcheck disable=SC2086
    module load $NANOCHAT_MODULES || loaded=$?
    $nounset
    ((loaded == 0)) || { echo "module load $NANOCHAT_MODULES failed with status $loaded; module avail lists what there is" >&2; return 1; }
fi
if [[ -n "$NANOCHAT_SCRATCH" ]]; then # the home directory of such a site is small, and caches would fill it
    export PIP_CACHE_DIR="${PIP_CACHE_DIR:-$NANOCHAT_SCRATCH/.cache/pip}"
    export HF_HUB_CACHE="${HF_HUB_CACHE:-$NANOCHAT_SCRATCH/.cache/huggingface/hub}" # the login stays at home
    export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$NANOCHAT_SCRATCH/.cache/triton}"
    export CUDA_CACHE_PATH="${CUDA_CACHE_PATH:-$NANOCHAT_SCRATCH/.cache/cuda}"
    export MPLCONFIGDIR="${MPLCONFIGDIR:-$NANOCHAT_SCRATCH/.cache/matplotlib}"
fi
export NANOCHAT_VENV="${NANOCHAT_VENV:-$PWD/.venv}"
[[ -z "$NANOCHAT_BASE_DIR" ]] || export NANOCHAT_BASE_DIR
[[ -z "$NANOCHAT_TIMEOUT" ]] || export NANOCHAT_TIMEOUT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONUNBUFFERED=1
export PATH="$NANOCHAT_VENV/bin:$PATH"
need_nanochat() {
    [[ -x "$NANOCHAT_VENV/bin/nanochat" ]] || { echo "nanochat is not installed in $NANOCHAT_VENV; run slurm/setup.sh first" >&2; return 1; }
}
