#!/usr/bin/env bash
# Makes the virtual environment, on a node with internet: NANOCHAT_SITE=<site> slurm/setup.sh. Repeating it is harmless.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/environment.sh
python3 -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else
"nanochat needs Python 3.10 or newer, found %d.%d; name a module with one in the site profile" % v[:2])'
[[ -x "$NANOCHAT_VENV/bin/python" ]] || python3 -m venv "$NANOCHAT_VENV"
"$NANOCHAT_VENV/bin/python" -m pip install --quiet --editable '.[web]'
echo "nanochat is installed in $NANOCHAT_VENV; next: slurm/fetch.sh"
