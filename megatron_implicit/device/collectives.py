"""Lets an observer see every blocking collective of torch.distributed.

torch has no hook around them, and Megatron-Core calls them from everywhere, so their names are bound anew: in
torch.distributed, and in Megatron-Core's modules where these keep one under a name of their own.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Callable, ContextManager

import torch.distributed as dist

_OBSERVED = (
    "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "reduce_scatter", "broadcast",
    "all_to_all_single", "all_gather_object", "broadcast_object_list", "barrier",
)  # fmt: skip


def observe_collectives(around: Callable[[], ContextManager[None]]) -> None:
    """Runs every later collective inside ``around()``. The first observer of a process stays; later ones are ignored.

    Not seen: the wait for a collective that was started asynchronously, and messages between two ranks, which may have
    threads of their own.
    """
    if hasattr(dist.all_reduce, "_observed"):
        return
    replacements = {getattr(dist, name): _observed(getattr(dist, name), around) for name in _OBSERVED}
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("megatron.core")]
    for module in (dist, *modules):
        for name, value in list(vars(module).items()):
            if callable(value) and _is_key(value, replacements):
                setattr(module, name, replacements[value])


def _observed(collective: Callable[..., Any], around: Callable[[], ContextManager[None]]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        with around():
            return collective(*args, **kwargs)

    call._observed = True
    return call


def _is_key(value: Any, keys: dict[Any, Any]) -> bool:
    try:
        return value in keys
    except TypeError:  # not hashable
        return False
