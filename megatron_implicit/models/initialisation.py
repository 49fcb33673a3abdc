"""Draws a model's parameters so that every layout starts from the same numbers.

Each module with an ``initialise(generator)`` draws its *whole* tensors from a generator seeded by the run's seed and
the module's global name (or ``drawn_as``, that of the module it is a copy of), then keeps its slice. Nothing depends on
the order of construction, on the rank, or on which stage a layer lives.
"""

from __future__ import annotations

import hashlib
from typing import Iterator

import torch
from torch import nn


def initialise_parameters(model: nn.Module, seed: int) -> None:
    """Initialises every module that knows how to.

    Raises:
        RuntimeError: a parameter belongs to no module with an ``initialise`` method.
    """
    drawn: set[int] = set()
    for name, module in named_modules_globally(model):
        if hasattr(module, "initialise"):
            module.initialise(_generator(seed, getattr(module, "drawn_as", name)))
            drawn.update(id(parameter) for parameter in _own_parameters(module))
    forgotten = [name for name, parameter in model.named_parameters() if id(parameter) not in drawn]
    if forgotten:
        raise RuntimeError(f"no module initialises {', '.join(forgotten)}")


def named_modules_globally(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` with layers numbered over the whole model instead of within a pipeline stage."""
    numbers = {
        name: f"{name.rsplit('.', 1)[0]}.{module.layer_number - 1}"
        for name, module in model.named_modules()
        if hasattr(module, "layer_number") and name.rsplit(".", 2)[-2:-1] == ["layers"]
    }
    for name, module in model.named_modules():
        prefix = next((local for local in numbers if name == local or name.startswith(local + ".")), None)
        yield (numbers[prefix] + name[len(prefix) :] if prefix is not None else name), module


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters a module's ``initialise`` is responsible for: its own, and its sections' for an assembled weight."""
    yield from module.parameters(recurse=hasattr(module, "sections"))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
