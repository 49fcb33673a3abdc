"""What a task is to training and evaluation."""

from __future__ import annotations

from typing import Literal, Protocol

from megatron_implicit.data.sampling import TaskSamples

__all__ = ["Split", "Task", "TaskSamples"]

Split = Literal["train", "validation", "test"]


class Task(Protocol):
    """Samples of a vocabulary of its own."""

    vocab_size: int
    """Entries of the vocabulary."""
    fingerprint: str
    """All that determines the data but seed, split and length; checkpoints keep it, a resumed run compares it."""

    def samples(self, split: Split, count: int, sequence_length: int, seed: int) -> TaskSamples:
        """Samples of a split.

        Sample i is the same for every count, batch size and layout: it depends on the arguments but ``count`` and on i
        alone.

        Args:
            split: no sample of one is made from the random numbers of another.
            count: samples that may be read.
            sequence_length: tokens of each.
            seed: of the data.
        """
        ...
