"""Makes a GPU add in a fixed order, so that the same step gives the same bits; a CPU does so anyway.

Without it three things vary from run to run: torch's and the compiled kernels' atomic additions, the block sizes that
Triton's autotuner finds fastest at that moment, and cuBLAS's choice of workspace. mamba-ssm (from 2.3.2) and
causal-conv1d (from 1.7) follow torch's switch.
"""

from __future__ import annotations

import os
import sys

import torch

_BLOCK_SIZES = {"M": 128, "N": 64, "K": 32}
"""Of mamba-ssm's scan, where a kernel offers them; else it takes its smallest."""


def fix_order_of_sums() -> None:
    """For the whole process, from now on; before mamba-ssm is imported, which picks its block sizes then.

    An operation that has no such version raises torch's RuntimeError, which names it: attention keeps the order only if
    torch is told to be so strict. ``train.deterministic=false`` is the way out.

    Raises:
        RuntimeError: mamba-ssm has been imported.
    """
    if not torch.cuda.is_available():
        return
    if "mamba_ssm" in sys.modules and not torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("fix_order_of_sums() came after the import of mamba_ssm")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name, size in _BLOCK_SIZES.items():
        os.environ.setdefault(f"TRITON_AUTOTUNE_BLOCK_SIZE_{name}", str(size))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would write every tensor twice
