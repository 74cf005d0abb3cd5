#!/usr/bin/env bash
# Fetches all data, on a node with internet: NANOCHAT_SITE=<site> slurm/fetch.sh [--preset d20]. Repeating it resumes.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/environment.sh
need_nanochat
nanochat fetch "$@"
nanochat preflight --data-only "$@"
