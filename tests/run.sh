#!/usr/bin/env bash
# Sets up and runs the tests: bash tests/run.sh [--no-venv] [--acceptance] [pytest's arguments, e.g. tests/solver -k name]

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup=() arguments=()
for argument in "$@"; do
    case $argument in
        --no-venv) setup+=("$argument") ;;
        *) arguments+=("$argument") ;;
    esac
done
python=$(bash launch/setup.sh --print-python ${setup[@]+"${setup[@]}"})

# Optional packages of the one test that runs Triton kernels in the interpreter; without them it is skipped.
if ! bash tests/ops/install_triton_check.sh "$python"; then
    echo "the Triton cross-check will be skipped: its packages could not be installed" >&2
fi

# A private Slurm on this machine; without it the tests in tests/slurm are skipped.
if ! bash tests/slurm/install_slurm.sh; then
    echo "the Slurm tests will be skipped: slurmctld, slurmd, slurm-client and munge could not be installed" >&2
fi

# The dashboard's page is tested in a browser, which arrives while the first tests run.
MEGATRON_IMPLICIT_PAGE_CHECK=$(mktemp -d)/done
export MEGATRON_IMPLICIT_PAGE_CHECK
bash tests/telemetry/install_page_check.sh "$MEGATRON_IMPLICIT_PAGE_CHECK" &

export OMP_NUM_THREADS=1
exec "$python" -m pytest --durations=15 ${arguments[@]+"${arguments[@]}"}
