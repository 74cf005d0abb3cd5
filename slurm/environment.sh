# Sourced by every script here, from the repository's root: the site's profile, modules, and the virtual environment.
# shellcheck shell=bash
site_settings="$(bash slurm/profile.sh "${NANOCHAT_SITE:-generic}")" || return 1
while IFS= read -r setting; do printf -v "${setting%%=*}" %s "${setting#*=}"; done <<< "$site_settings"
if [[ -n "$NANOCHAT_MODULES" ]]; then
    type module > /dev/null 2>&1 || { echo "the profile of ${NANOCHAT_SITE:-generic} names modules, and there is no module command" >&2; return 1; }
    # shellcheck disable=SC2086
    module load $NANOCHAT_MODULES
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
