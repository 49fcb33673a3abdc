"""Held-out perplexity of a loaded model, with the inference solve."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Literal, Optional

import torch

from megatron_implicit.api import PretrainedModel
from megatron_implicit.config import DataConfig
from megatron_implicit.data.datasets import open_datasets, open_tokenizer
from megatron_implicit.data.sampling import Batch, Samples, TaskSamples, read_microbatch
from megatron_implicit.data.tasks import open_task
from megatron_implicit.data.tokenizers import load_tokenizer
from megatron_implicit.errors import DataError
from megatron_implicit.inference.text import TOKENIZER_NAMES, check_tokenizer
from megatron_implicit.models.parameters import count_parameters
from megatron_implicit.training.validation import HeldOutLoss, measure_loss

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class PerplexityResult:
    """A held-out measurement and what it was measured on."""

    family: str
    parameters: int
    """Logical parameters of the whole model."""
    data: str
    """Path of the text, or the task."""
    tokenizer: Optional[str]
    """Fingerprint of the text's tokenizer; None of a task."""
    split: Split
    sequence_length: int
    sequences: int
    measured: HeldOutLoss

    def as_dict(self) -> dict[str, float | int | str | None]:
        """For JSON."""
        return {
            "family": self.family,
            "parameters": self.parameters,
            "data": self.data,
            "tokenizer": self.tokenizer,
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
        data_path: where the data is now; None takes the ``data.path`` of the model's run.
        batch_size: sequences at a time; changes nothing but speed.
        max_sequences: measure only the first ones; of a task, which has no end, as many as a validation while training.
        report: called with sequences done and in all.

    Raises:
        DataError: the data is missing, damaged, of another tokenizer, or has no such split, or a model that comes from
            no run is to be measured on data that nobody named.
    """
    data = dataclasses.replace(lm.config.data, path=data_path or lm.config.data.path)
    is_text = data.task == "text"
    if data_path is None:
        refuse_unknown_data(lm, "name some that was made with its tokenizer, with --data-path")
    samples = open_split(lm, data, split) if is_text else _open_task_split(data, split, lm, max_sequences)
    total = min(len(samples), max_sequences or len(samples))

    def batches() -> Iterator[Batch]:
        for start in range(0, total, batch_size):
            stop = min(start + batch_size, total)
            yield read_microbatch(samples, range(start, stop))
            report(stop, total)

    device = next(lm.parameters()).device
    measured = measure_loss(lm.model, batches(), torch.device(device))
    parameters = sum(count.whole for count in count_parameters(lm.model).values())
    source, tokenizer = (data.path, open_tokenizer(data).fingerprint) if is_text else (data.task, None)
    return PerplexityResult(
        lm.config.model.family, parameters, source, tokenizer, split, data.sequence_length, total, measured
    )


def refuse_unknown_data(lm: PretrainedModel, remedy: str) -> None:
    """Refuses to take the data that a configuration names by default for that of a model that comes from no run.

    Raises:
        DataError: nothing is known of the model's data; ends with ``remedy``.
    """
    if lm.config.data.task == "text" and lm.tokenizer_fingerprint is None:
        raise DataError(f"the model brings no data of its own, as a run's checkpoint does: {remedy}")


def refuse_other_tokenizer(folder: Path, data_path: str) -> None:
    """Compares the data that a model is to be measured on with the tokenizer files in the model's folder, if any.

    Raises:
        DataError: it was made with none of them.
    """
    made_with = open_tokenizer(DataConfig(path=data_path)).fingerprint
    known = {}
    for file in (folder / name for name in TOKENIZER_NAMES):
        with contextlib.suppress(DataError):  # missing, or none that data could be made with
            known[load_tokenizer(file).fingerprint] = file
    if known and made_with not in known:
        file = next(iter(known.values()))
        raise DataError(
            f"the data at {data_path} was made with another tokenizer (fingerprint {made_with[:12]}) than {file}: "
            "prepare it with that one (tools/preprocess_data.py), or, if both give the same ids, take the file away"
        )


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
    check_tokenizer(lm, tokenizer, f"the tokenizer of {data.path}", "name data made with the model's own")
    wanted = {"validation": 0, "test": 0, split: None}
    datasets = open_datasets(
        data, tokenizer, train_samples=0, validation_samples=wanted["validation"], test_samples=wanted["test"],
        seed=lm.config.train.seed,
    )  # fmt: skip
    samples = getattr(datasets, split)
    if samples is None:
        raise DataError(f"data.split={data.split} leaves no documents for {split}: choose another split")
    return samples
