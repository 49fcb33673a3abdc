#!/usr/bin/env bash
# Checks Python 3.12 with the newest Megatron-Core: a clean copy, its own .venv, the quickstart, the goldens, and what reads checkpoints.
# bash tests/python312.sh [FOLDER]: FOLDER keeps the copy and its .venv between calls (default: a temporary one).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3.12}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
    echo "error: $PYTHON is no Python 3.12: set PYTHON to one" >&2
    exit 1
fi
export PYTHON

if (($#)); then
    folder=$1
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder"
git archive HEAD | tar -x -C "$folder"
cd "$folder"
for model in implicit_mamba2 implicit_llama; do
    rm -rf "runs/quickstart/$model"
    bash launch/quickstart.sh --model "$model" --train.steps 30 --train.validate_every 30
done
bash tests/run.sh tests/models tests/training/test_golden_training.py tests/distributed/test_golden_tensor_parallel.py \
    tests/distributed/test_golden_pipeline.py tests/checkpoint tests/conversion tests/test_api.py
