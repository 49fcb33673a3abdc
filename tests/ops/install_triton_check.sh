#!/usr/bin/env bash
# Installs what test_triton_kernels.py needs into the environment of PYTHON:
#
#     bash tests/ops/install_triton_check.sh .venv/bin/python
#
# Triton, and mamba-ssm's Python files without its compiled module: enough to interpret its Triton kernels on a CPU,
# not to run its models. Does nothing where it is already there, and nothing on a machine with a GPU, where this
# mamba-ssm would stand in the way of the compiled one (requirements-cuda.txt) and tests/gpu tests the real kernels.
# Needs torch and setuptools in the environment; downloads about 200 MB (Triton), takes half a minute.
set -euo pipefail

python=${1:?usage: install_triton_check.sh PYTHON}

state=$("$python" - <<'PY'
import re
from importlib import metadata

import torch


def version(name):
    try:
        return tuple(int(part) for part in re.findall(r"\d+", metadata.version(name))[:3])
    except metadata.PackageNotFoundError:
        return ()


if torch.cuda.is_available():
    print("gpu")
elif version("mamba-ssm") == (2, 3, 2) and version("triton") >= (3, 5) and version("einops"):
    print("installed")
else:
    print("missing")
PY
)

case $state in
    gpu) echo "a GPU is present: not installing the interpreted kernels, tests/gpu tests the real ones" ;;
    installed) ;;
    missing)
        pip=("$python" -m pip install --quiet --disable-pip-version-check --no-deps)
        "${pip[@]}" einops packaging 'triton>=3.5,<3.10'
        # Without these two variables setup.py looks for nvcc, or downloads a wheel for a CUDA build of torch.
        MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "${pip[@]}" --no-build-isolation 'mamba-ssm==2.3.2.*'
        ;;
esac
