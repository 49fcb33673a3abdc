"""The batches of one replica, for training and validation."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

from megatron_implicit.config import Config
from megatron_implicit.data.blend import blend_fingerprint
from megatron_implicit.data.datasets import Datasets, open_datasets, open_tokenizer
from megatron_implicit.data.sampling import Batch, MicrobatchSampler, read_batches, read_microbatch
from megatron_implicit.data.tasks import Task, open_task
from megatron_implicit.data.tokenizers import Tokenizer
from megatron_implicit.errors import ConfigError, DataError


class TrainingData:
    """Training batches from any consumed-sample count on, and the fixed batches of a validation.

    Args:
        config: resolved.
        vocabulary: the dataset's tokenizer, or the task, as ``open_vocabulary`` returns it.
        replica: this data-parallel rank.
        replicas: data-parallel ranks.

    Raises:
        DataError: datasets that are missing, damaged, too small or of another tokenizer.
    """

    def __init__(self, config: Config, vocabulary: Tokenizer | Task, replica: int, replicas: int) -> None:
        train = config.train
        self._validation_samples = train.validation_batches * train.global_batch_size if train.validate_every else 0
        is_text = config.data.task == "text"
        self._datasets = (_text if is_text else _of_task)(config, vocabulary, self._validation_samples)
        self._sampler = MicrobatchSampler(train.global_batch_size, train.micro_batch_size, replicas, replica)
        prefix = f"{blend_fingerprint(config.data)}:" if is_text else ""
        self.fingerprint = prefix + vocabulary.fingerprint

    @property
    def has_validation(self) -> bool:
        """Whether there are held-out samples to measure on."""
        return self._datasets.validation is not None

    @property
    def training_samples(self) -> int:
        """Samples that could be read, at least those of the run."""
        return len(self._datasets.train)

    def training_batches(self, consumed_samples: int) -> Iterator[Batch]:
        """This replica's microbatches from a consumed-sample count on, without end."""
        return read_batches(self._datasets.train, self._sampler, consumed_samples)

    def validation_batches(self) -> Iterator[Batch]:
        """This replica's share of the validation samples, the same at every call."""
        step = self._sampler.global_batch_size
        for consumed in range(0, self._validation_samples, step):
            for indices in self._sampler.step(consumed):
                yield read_microbatch(self._datasets.validation, indices)


def _text(config: Config, tokenizer: Tokenizer, validation_samples: int) -> Datasets:
    train = config.train
    return open_datasets(
        config.data,
        tokenizer,
        train_samples=train.steps * train.global_batch_size,
        validation_samples=validation_samples if config.data.split[1] > 0 else 0,
        test_samples=0,
        seed=train.seed,
    )


def _of_task(config: Config, task: Task, validation_samples: int) -> Datasets:
    train, length = config.train, config.data.sequence_length
    validation = task.samples("validation", validation_samples, length, train.seed) if validation_samples else None
    training = task.samples("train", train.steps * train.global_batch_size, length, train.seed)
    return Datasets(train=training, validation=validation, test=None)


def open_vocabulary(config: Config) -> Tokenizer | Task:
    """What the run's tokens mean: its tokenizer, or its task; sets ``model.vocab_size`` where that is left open.

    Raises:
        ConfigError: there are more entries than ``model.vocab_size``, or the task has impossible settings.
        DataError: there is no tokenizer, or no files of the task.
    """
    vocabulary = _open_text(config) if config.data.task == "text" else open_task(config.data)
    if config.model.vocab_size is None:
        config.model.vocab_size = vocabulary.vocab_size
    if vocabulary.vocab_size > config.model.vocab_size:
        owner = "tokenizer" if config.data.task == "text" else "task"
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {owner}'s {vocabulary.vocab_size} "
            "entries: raise it or drop it"
        )
    return vocabulary


def _open_text(config: Config) -> Tokenizer:
    path = Path(config.data.path)
    if not path.is_dir() and not Path(f"{path}.idx").is_file():
        raise DataError(f"data.path={path}: no such folder or dataset; make one with tools/preprocess_data.py")
    return open_tokenizer(config.data)
