"""The precision inside an operation."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32 for anything narrower (statistics, decays and states lose too much in bfloat16); float64 stays."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
