"""Which samples a rank reads in which microbatch, and how samples become a batch.

Microbatch k of a step that begins after ``consumed`` samples holds samples consumed + k * micro_batch_size onwards, and
goes to data-parallel rank k mod size. The set of microbatches is therefore the same for every number of replicas, and
the only state is the number of consumed samples. No random number is drawn here: the datasets are shuffled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from megatron_implicit.errors import ConfigError, DataError

Batch = dict[str, torch.Tensor]
"""tokens, labels, position_ids [b, s] int64 and loss_mask [b, s] float32."""

_DTYPES = {"tokens": torch.int64, "labels": torch.int64, "loss_mask": torch.float32, "position_ids": torch.int64}


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where it is computed with.

    From locked memory a GPU copies when its turn comes. From other memory the host would wait until all that was queued
    before is done, messages of other pipeline stages included.
    """
    if device.type == "cpu":
        return batch
    return {name: value.pin_memory().to(device, non_blocking=True) for name, value in batch.items()}


class Samples(Protocol):
    """A map-style dataset of dicts of tensors [s]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]: ...


@runtime_checkable
class TaskSamples(Protocol):
    """Samples that are made a batch at a time."""

    def __len__(self) -> int: ...

    def batch(self, indices: range) -> Batch:
        """Samples ``indices`` of fresh tensors; each depends on its index alone."""


@dataclass(frozen=True)
class MicrobatchSampler:
    """Sample indices of one data-parallel rank; all sizes in sequences."""

    global_batch_size: int
    """Sequences of one step, over all replicas."""
    micro_batch_size: int
    """Sequences of one microbatch."""
    data_parallel_size: int = 1
    """Replicas."""
    data_parallel_rank: int = 0
    """This replica."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.data_parallel_size < 1:
            raise ConfigError(
                f"train.micro_batch_size {self.micro_batch_size} and the {self.data_parallel_size} replicas"
                " must be positive"
            )
        if self.global_batch_size < 1 or self.global_batch_size % (self.micro_batch_size * self.data_parallel_size):
            raise ConfigError(
                f"train.global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size"
                f" {self.micro_batch_size}"
                f" times {self.data_parallel_size} replicas; change one of them"
            )
        if not 0 <= self.data_parallel_rank < self.data_parallel_size:
            raise ConfigError(
                f"data-parallel rank {self.data_parallel_rank} is not below the {self.data_parallel_size} replicas"
            )

    @property
    def num_microbatches(self) -> int:
        """Microbatches of this rank in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def step(self, consumed: int) -> list[range]:
        """Sample indices of this rank's microbatches, in order, in the step that begins after ``consumed`` samples."""
        first = consumed + self.data_parallel_rank * self.micro_batch_size
        stride = self.micro_batch_size * self.data_parallel_size
        starts = range(first, consumed + self.global_batch_size, stride)
        return [range(start, start + self.micro_batch_size) for start in starts]

    def microbatches(self, consumed: int = 0) -> Iterator[range]:
        """Sample indices of this rank's microbatches from ``consumed`` samples on, without end."""
        while True:
            yield from self.step(consumed)
            consumed += self.global_batch_size


def collate(samples: Sequence[Mapping[str, torch.Tensor]]) -> Batch:
    """Samples (dicts of [s]) as one batch (dict of [b, s]) of fresh tensors."""
    return {key: torch.stack([sample[key] for sample in samples]).to(dtype) for key, dtype in _DTYPES.items()}


def read_microbatch(dataset: Samples | TaskSamples, indices: range) -> Batch:
    """The samples ``indices`` of ``dataset`` as one batch.

    Raises:
        DataError: the dataset was opened for fewer samples.
    """
    if indices.stop > len(dataset):
        raise DataError(
            f"sample {indices.stop - 1} was asked of a dataset opened for {len(dataset)} samples; open it for"
            " the samples of the whole run"
        )
    if isinstance(dataset, TaskSamples):
        return dataset.batch(indices)
    return collate([dataset[index] for index in indices])


def read_batches(dataset: Samples | TaskSamples, sampler: MicrobatchSampler, consumed: int = 0) -> Iterator[Batch]:
    """This rank's microbatches from ``consumed`` samples on; ends never, raises DataError past the dataset's end."""
    for indices in sampler.microbatches(consumed):
        yield read_microbatch(dataset, indices)
