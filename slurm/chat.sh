#!/usr/bin/env bash
# Talk with the trained model on a compute node: NANOCHAT_SITE=<site> slurm/chat.sh [options of nanochat chat]
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/environment.sh
need_nanochat
options=(--mem=32G --time=1:00:00 --pty)
[[ -z "${NANOCHAT_ACCOUNT:-}" ]] || options+=("--account=$NANOCHAT_ACCOUNT")
[[ -z "${NANOCHAT_PARTITION:-}" ]] || options+=("--partition=$NANOCHAT_PARTITION")
[[ -z "${NANOCHAT_GRES:-}" ]] || options+=("--gres=$NANOCHAT_GRES:1")
exec srun "${options[@]}" nanochat chat "$@"
