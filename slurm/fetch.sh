#!/usr/bin/env bash
# Fetches all data, on a node with internet: NANOCHAT_SITE=<site> slurm/fetch.sh [--preset d20]. Repeating it resumes.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/environment.sh
need_nanochat
nanochat fetch "$@"
chosen=() # of the options, those that preflight has too
while (($#)); do
  case "$1" in
    --preset | --shards) chosen+=("$1" "$2") && shift ;;
    --preset=* | --shards=*) chosen+=("$1") ;;
  esac
  shift
done
nanochat preflight --data-only "${chosen[@]}"
