"""An explicit model as the start of an implicit one: the same weights, normed, and an injection made from them.

Every weight W becomes v = W with gain g = ||v|| by rows, so the effective weights are W. The injection, which an
explicit model does not have, is set to what the first layer does with the embedding: its norm, its input projection
(in_proj of Mamba2; query, key and value of Llama), no bias. With z = 0 the first layer then starts the first pass
with exactly the projection that the explicit model computes there, and the iteration starts from a model that has
learnt to read its input. What the layers add up to is still another function, which training has to bring to its
fixed point: start with the bounded phase, at a small learning rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_implicit.config import InferenceConfig, SolverConfig
from megatron_implicit.config.resolve import resolve
from megatron_implicit.config.validate import validate
from megatron_implicit.conversion.stored import StoredModel, StoredTensor
from megatron_implicit.errors import ConfigError
from megatron_implicit.ops.weight_norm import row_norms

_FIRST = "backbone.layers.0."
_INPUT = {"mamba2": ("mixer.in_proj.weight",), "llama": ("mixer.wq.weight", "mixer.wk.weight", "mixer.wv.weight")}
_NORMED = ("mixer.in_proj", "mixer.conv1d", "mixer.out_proj", "mixer.wq", "mixer.wk", "mixer.wv", "mlp.w1", "mlp.w3",
           "mlp.fc2")  # fmt: skip


def start_implicit(model: StoredModel) -> StoredModel:
    """The implicit model that an explicit one starts; its tensors are made when they are read.

    Raises:
        ConfigError: the model is implicit already, or has dropout.
    """
    if model.config.implicit:
        raise ConfigError(f"--implicit-from-explicit: {model.folder} holds an implicit model already: drop the option")
    tensors = dict(_injection(model))
    for name, tensor in model.tensors.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner.endswith(_NORMED):
            tensors |= _normed(owner, tensor)
        else:
            tensors[name] = tensor
    config = dataclasses.replace(
        model.config,
        model=dataclasses.replace(model.config.model, family=f"implicit_{model.config.architecture}"),
        solver=SolverConfig(), inference=InferenceConfig(), curriculum=[],
    )  # fmt: skip
    config = resolve(config)
    validate(config)
    return dataclasses.replace(model, config=config, tensors=tensors, origin=None)


def _injection(model: StoredModel) -> Iterator[tuple[str, StoredTensor]]:
    yield "backbone.injection_norm.weight", model.tensors[_FIRST + "norm.weight"]
    parts = [model.tensors[_FIRST + name] for name in _INPUT[model.config.architecture]]
    rows, dtype = sum(part.shape[0] for part in parts), parts[0].dtype
    whole = StoredTensor(
        ", ".join(part.key for part in parts), (rows, *parts[0].shape[1:]), dtype,
        lambda: torch.cat([part.read() for part in parts]),
    )  # fmt: skip
    yield from _normed("backbone.injection", whole).items()
    yield "backbone.injection.bias", StoredTensor("zeros", (rows,), dtype, lambda: torch.zeros(rows, dtype=dtype))


def _normed(owner: str, tensor: StoredTensor) -> dict[str, StoredTensor]:
    """v and g of a weight."""
    shape = (tensor.shape[0], *[1] * (len(tensor.shape) - 1))

    def gains() -> Tensor:
        return row_norms(tensor.read()).to(tensor.dtype).view(shape)

    return {
        f"{owner}.weight_g": dataclasses.replace(tensor, shape=shape, read=gains),
        f"{owner}.weight_v": tensor,
    }
