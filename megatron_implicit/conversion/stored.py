"""A model in a folder of any format: its configuration, and its tensors by the reference's names, read one by one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from megatron_implicit.config import Config, ParallelConfig
from megatron_implicit.config.resolve import resolve
from megatron_implicit.errors import CheckpointError

EMBEDDING, HEAD = "word_emb.emb.weight", "lm_head.weight"
"""Names of the token embedding, and of the output head of a model that does not tie it to the embedding."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that weights may have."""
_BLOCK = 1 << 22
"""Elements compared at once: a comparison must not need the memory of its tensors again."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk."""

    key: str
    """Its name in its file."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """The tensor, on the CPU; mapped from its file where the format allows."""

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def as_dtype(self, dtype: torch.dtype) -> "StoredTensor":
        """The same tensor, converted when it is read."""
        return dataclasses.replace(self, dtype=dtype, read=lambda: self.read().to(dtype))


@dataclass(frozen=True)
class StoredModel:
    """What every format's reader returns and every format's writer takes."""

    folder: Path
    format: str
    """Name of the format it was read from."""
    config: Config
    tensors: dict[str, StoredTensor]
    """By the reference's names, a layer's under ``backbone.layers.N.``; an untied head under ``lm_head.weight``."""
    origin: Optional["Origin"] = None
    """The config.json the model came in with."""
    unmapped: dict[str, str] = field(default_factory=dict)
    """Tensors of the folder that the model does not need, and why."""
    tokenizer_fingerprint: Optional[str] = None
    """Of the tokenizer that a run's data was made with; None of any other model."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        return self.tensors[EMBEDDING].dtype

    def converted(self, dtype: torch.dtype) -> "StoredModel":
        """The same model with all tensors in another dtype."""
        return dataclasses.replace(self, tensors={name: t.as_dtype(dtype) for name, t in self.tensors.items()})


@dataclass(frozen=True)
class Origin:
    """A foreign config.json. Kept beside a converted checkpoint, so that the way back gives the same file."""

    format: str
    config: dict[str, Any]


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of a model as a mapping that reads on access."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def on_one_process(config: Config) -> Config:
    """The configuration without the layout of whatever run it comes from."""
    return resolve(dataclasses.replace(config, parallel=ParallelConfig()))


def take_head(
    tensors: dict[str, StoredTensor], head: Optional[StoredTensor], tied: bool, source: str, switch: str
) -> dict[str, str]:
    """Adds the head of an untied model, or shows that a tied one's only repeats the embedding.

    Args:
        tensors: by the reference's names; changed in place.
        head: the output head, if the folder has one.
        tied: what its configuration says.
        source: the folder, for messages.
        switch: the configuration's key that says so.

    Returns:
        the head as an unmapped tensor, where it is a repetition.

    Raises:
        CheckpointError: weights and configuration contradict each other.
    """
    if not tied and head is None:
        raise CheckpointError(
            f"{source} lacks the output head although {switch}=false: set it to true or copy it again"
        )
    if not tied:
        tensors[HEAD] = head
        return {}
    if head is None:
        return {}
    if EMBEDDING in tensors and not same_values(head.read(), tensors[EMBEDDING].read()):
        raise CheckpointError(
            f"{source}: {head.key} differs from the embedding although {switch}=true: set it to false in config.json"
        )
    return {head.key: "repeats the embedding"}


def check_dtypes(tensors: Mapping[str, StoredTensor], source: str, wanted: Optional[torch.dtype] = None) -> None:
    """Refuses what cannot be a weight.

    Raises:
        CheckpointError: a tensor of integers or of an unknown kind of float, by name.
    """
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point or (wanted is None and tensor.dtype not in DTYPES):
            remedy = (
                "give --dtype float32" if tensor.dtype is torch.float64 else "weights are float32, bfloat16 or float16"
            )
            raise CheckpointError(f"{source}: {tensor.key} has dtype {str(tensor.dtype)[6:]}: {remedy}")


def check_shapes(tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Compares what a folder holds with what its configuration describes.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape; the first one, by name.
    """
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(f"{source} lacks {some(missing)}: it does not hold the model its configuration describes")
    extra = [tensor.key for name, tensor in tensors.items() if name not in expected]
    if extra:
        raise CheckpointError(
            f"{source} has unexpected {some(extra)}: it does not hold the model its configuration describes"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise CheckpointError(
                f"{source}: {tensors[name].key} has shape {tuple(tensors[name].shape)} instead of {tuple(shape)}: "
                "it does not hold the model its configuration describes"
            )


def some(names: list[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def same_values(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal."""
    return tensor.shape == other.shape and largest_difference(tensor, other) == 0.0


def largest_difference(tensor: Tensor, other: Tensor) -> float:
    """The largest absolute difference of two tensors of one shape, without temporaries of their size.

    Equal bits differ by 0, a NaN included; otherwise a NaN makes the difference infinite.
    """
    largest = 0.0
    for a, b in zip(tensor.reshape(-1).split(_BLOCK), other.reshape(-1).split(_BLOCK), strict=True):
        if a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            continue
        difference = (a.float() - b.float()).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
        largest = max(largest, float(difference.max()))
    return largest
