"""The batches of one replica, for training and validation."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

from megatron_implicit.config import Config
from megatron_implicit.data.blend import blend_fingerprint
from megatron_implicit.data.datasets import open_datasets, open_tokenizer
from megatron_implicit.data.sampling import Batch, MicrobatchSampler, read_batches, read_microbatch
from megatron_implicit.data.tokenizers import Tokenizer
from megatron_implicit.errors import ConfigError, DataError


class TrainingData:
    """Training batches from any consumed-sample count on, and the fixed batches of a validation.

    Args:
        config: resolved.
        tokenizer: the dataset's.
        replica: this data-parallel rank.
        replicas: data-parallel ranks.

    Raises:
        DataError: datasets that are missing, damaged, too small or of another tokenizer.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, replica: int, replicas: int) -> None:
        train = config.train
        self._validation_samples = train.validation_batches * train.global_batch_size
        wanted = self._validation_samples if train.validate_every and config.data.split[1] > 0 else 0
        self._datasets = open_datasets(
            config.data,
            tokenizer,
            train_samples=train.steps * train.global_batch_size,
            validation_samples=wanted,
            test_samples=0,
            seed=train.seed,
        )
        self._sampler = MicrobatchSampler(train.global_batch_size, train.micro_batch_size, replicas, replica)
        self.fingerprint = f"{blend_fingerprint(config.data)}:{tokenizer.fingerprint}"

    @property
    def has_validation(self) -> bool:
        """Whether there are held-out documents to measure on."""
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


def open_run_tokenizer(config: Config) -> Tokenizer:
    """The run's tokenizer; sets ``model.vocab_size`` where the configuration leaves it open.

    Raises:
        ConfigError: the tokenizer has more entries than ``model.vocab_size``.
        DataError: there is no tokenizer.
    """
    path = Path(config.data.path)
    if not path.is_dir() and not Path(f"{path}.idx").is_file():
        raise DataError(f"data.path={path}: no such folder or dataset; make one with tools/preprocess_data.py")
    tokenizer = open_tokenizer(config.data)
    if config.model.vocab_size is None:
        config.model.vocab_size = tokenizer.vocab_size
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} "
            "entries: raise it or drop it"
        )
    return tokenizer
