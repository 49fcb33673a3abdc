"""Counts a model's parameters by component, over the whole model and on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from megatron_implicit.layers.sharding import placed_parameters

COMPONENTS = {
    "embedding": "embedding and head",
    "output_layer": "embedding and head",
    "injection": "injection",
    "in_proj": "input projections",
    "linear_qkv": "query, key, value",
    "conv1d": "convolutions",
    "out_proj": "output projections",
    "linear_proj": "output projections",
    "mlp": "MLPs",
}
"""Component by a part of the parameter's name; what matches none is a norm or one of Mamba2's per-head parameters."""


@dataclass
class ComponentCount:
    """Parameters of a component."""

    whole: int = 0
    """Logical parameters of the model (of this pipeline stage), copies of another stage's left out."""
    local: int = 0
    """Parameters this rank holds."""
    local_bytes: int = 0
    """Bytes of those."""


def count_parameters(model: nn.Module) -> dict[str, ComponentCount]:
    """Counts by component, in the table's order."""
    counts: dict[str, ComponentCount] = {}
    for name, parameter, placement, copy_number in placed_parameters(model.named_modules()):
        parts = name.split(".")
        component = next((text for part, text in COMPONENTS.items() if part in parts), "norms and per-head parameters")
        count = counts.setdefault(component, ComponentCount())
        whole = parameter.numel()
        if placement is not None:
            whole = whole // parameter.shape[placement.axis] * placement.partition.logical
        count.whole += whole if copy_number == 0 else 0
        count.local += parameter.numel()
        count.local_bytes += parameter.numel() * parameter.element_size()
    return counts
