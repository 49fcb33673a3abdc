"""The random generators of this rank: torch's, and Megatron-Core's tracker."""

from __future__ import annotations

from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """States of all generators, as :func:`restore_random_state` takes them."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_initialized():
        state["device"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Sets all generators back."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "device" in state:
        torch.cuda.set_rng_state(state["device"])
