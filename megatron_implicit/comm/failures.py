"""Telling a transfer or collective that failed, because another rank is gone, from other errors."""

from __future__ import annotations

import torch.distributed as dist

_SIGNS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket")


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective or transfer failed: Gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(sign in str(error).lower() for sign in _SIGNS)
