#!/usr/bin/env bash
# Submits runs to Slurm: bash SLURM/submit.sh PRESET [--dry-run] [--chain N] [--bounded] [--branch RUN@FRACTION] ...
# --help says more; launch/submit.py does the work.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || { echo "error: there is no $python: run 'bash launch/setup.sh' first, or set PYTHON" >&2; exit 2; }
exec "$python" -W ignore "$root/launch/submit.py" "$@"
