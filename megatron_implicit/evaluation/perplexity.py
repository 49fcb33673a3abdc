"""Held-out perplexity of a loaded model, with the inference solve."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Callable, Iterator, Literal, Optional

import torch

from megatron_implicit.api import PretrainedModel
from megatron_implicit.config import DataConfig
from megatron_implicit.data.datasets import open_datasets, open_tokenizer
from megatron_implicit.data.sampling import Batch, Samples, TaskSamples, read_microbatch
from megatron_implicit.data.tasks import open_task
from megatron_implicit.errors import DataError
from megatron_implicit.models.parameters import count_parameters
from megatron_implicit.training.validation import HeldOutLoss, measure_loss

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class PerplexityResult:
    """A held-out measurement and what it was measured on."""

    family: str
    parameters: int
    """Logical parameters of the whole model."""
    split: Split
    sequence_length: int
    sequences: int
    measured: HeldOutLoss

    def as_dict(self) -> dict[str, float | int | str]:
        """For JSON."""
        return {
            "family": self.family,
            "parameters": self.parameters,
            "split": self.split,
            "sequence_length": self.sequence_length,
            "sequences": self.sequences,
            "tokens": self.measured.tokens,
            "loss": self.measured.loss,
            "perplexity": self.measured.perplexity,
            "evaluations_mean": self.measured.evaluations,
            "unconverged_fraction": self.measured.unconverged,
        }


def measure_perplexity(
    lm: PretrainedModel,
    *,
    split: Split = "validation",
    data_path: Optional[str] = None,
    batch_size: int = 4,
    max_sequences: Optional[int] = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> PerplexityResult:
    """Perplexity over a split's sequences, each once, split and packed as in training.

    Args:
        lm: a loaded model; its configuration says data, split shares and seed.
        split: validation or test documents.
        data_path: where the data is now; None takes the configuration's ``data.path``.
        batch_size: sequences at a time; changes nothing but speed.
        max_sequences: measure only the first ones; of a task, which has no end, as many as a validation while training.
        report: called with sequences done and in all.

    Raises:
        DataError: the data is missing, damaged, of another tokenizer, or has no such split.
    """
    data = dataclasses.replace(lm.config.data, path=data_path or lm.config.data.path)
    samples = open_split(lm, data, split) if data.task == "text" else _open_task_split(data, split, lm, max_sequences)
    total = min(len(samples), max_sequences or len(samples))

    def batches() -> Iterator[Batch]:
        for start in range(0, total, batch_size):
            stop = min(start + batch_size, total)
            yield read_microbatch(samples, range(start, stop))
            report(stop, total)

    device = next(lm.parameters()).device
    measured = measure_loss(lm.model, batches(), torch.device(device))
    parameters = sum(count.whole for count in count_parameters(lm.model).values())
    return PerplexityResult(lm.config.model.family, parameters, split, data.sequence_length, total, measured)


def _open_task_split(
    data: DataConfig, split: Split, lm: PretrainedModel, max_sequences: Optional[int]
) -> TaskSamples:
    train = lm.config.train
    count = max_sequences or train.validation_batches * train.global_batch_size
    return open_task(data).samples(split, count, data.sequence_length, train.seed)


def open_split(lm: PretrainedModel, data: DataConfig, split: Split) -> Samples:
    """A split's samples, each once, cut as in the model's training.

    Raises:
        DataError: the data is missing, damaged, of another tokenizer, or has no such split.
    """
    tokenizer = open_tokenizer(data)
    if tokenizer.vocab_size > lm.config.model.vocab_size:
        raise DataError(
            f"the tokenizer at {data.path} has {tokenizer.vocab_size} entries, the model {lm.config.model.vocab_size}: "
            "point --data-path to the data the model was trained on"
        )
    wanted = {"validation": 0, "test": 0, split: None}
    datasets = open_datasets(
        data, tokenizer, train_samples=0, validation_samples=wanted["validation"], test_samples=wanted["test"],
        seed=lm.config.train.seed,
    )  # fmt: skip
    samples = getattr(datasets, split)
    if samples is None:
        raise DataError(f"data.split={data.split} leaves no documents for {split}: choose another split")
    return samples
