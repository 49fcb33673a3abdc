"""Train, validation and test samples of fixed length, by Megatron-Core's GPTDataset, split by random documents.

Documents are permuted by the seed and cut into the three shares; each split packs its own documents, ends of documents
included, into samples of ``sequence_length`` + 1 tokens. Several datasets of one folder are blended by their tokens.
Sample indices are cached on disk by rank 0 and memory-mapped by all. No global random state is read or changed.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data.indexed import check_indexed, find_prefixes, read_manifest
from megatron_implicit.data.megatron import (
    BlendedDataset,
    BlendedMegatronDatasetBuilder,
    GPTDataset,
    GPTDatasetConfig,
    Split,
    indexed_dataset,
)
from megatron_implicit.data.sampling import Samples
from megatron_implicit.data.tokenizers import Tokenizer, load_tokenizer
from megatron_implicit.errors import DataError

T = TypeVar("T")

_NAMES = {Split.train: "train", Split.valid: "validation", Split.test: "test"}
_SPLIT_STREAM = 0x5B117
"""Sets the random stream that splits documents apart from others of the same seed."""


@dataclass(frozen=True)
class Datasets:
    """The three splits. Each item is a dict of tokens, labels, position_ids [s] int64 and loss_mask [s] float32.

    A split that was not asked for (0 samples), or whose share of the documents is 0, is None. A split may be longer
    than asked.
    """

    train: Samples | None
    validation: Samples | None
    test: Samples | None


def open_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer ``data.tokenizer``, or the one beside the dataset: tokenizer.model or tokenizer.json.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    folder = _folder(data)
    for name in ("tokenizer.model", "tokenizer.json"):
        if (folder / name).exists():
            return load_tokenizer(folder / name)
    raise DataError(
        f"no tokenizer.model or tokenizer.json in {folder}; put the dataset's tokenizer there or set data.tokenizer"
    )


def open_datasets(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    train_samples: int | None,
    validation_samples: int | None,
    test_samples: int | None,
    seed: int,
) -> Datasets:
    """Opens the datasets at ``data.path``; in a distributed job all ranks call it and all raise if one does.

    Args:
        data: path, split, sequence length and cache folder.
        tokenizer: must be the one the datasets were made with.
        train_samples, validation_samples, test_samples: samples to draw, going through the split's documents as often
            as needed; None draws each document once; 0 leaves the split out. The order of the samples depends on the
            number drawn, so a resumed run must ask for the same.
        seed: of split and order.

    Raises:
        DataError: missing, damaged or foreign files, or a split too small for one sample.
    """
    sizes = (train_samples, validation_samples, test_samples)

    def build(verify_index: bool) -> Datasets:
        for prefix in find_prefixes(data.path):
            check_indexed(prefix, tokenizer, verify_index=verify_index)
        return _build(data, tokenizer, sizes, seed)

    first = not dist.is_initialized() or dist.get_rank() == 0
    datasets = _agreed(lambda: build(verify_index=True) if first else None)
    return _agreed(lambda: datasets if datasets is not None else build(verify_index=False))


def split_documents(documents: int, shares: list[float], seed: int) -> list[np.ndarray]:
    """Document numbers (int32, in random order) of train, validation and test: disjoint, together all of them.

    Depends on the number of documents, not on their tokens: another tokenizer gives the same split.
    """
    order = np.random.default_rng([_SPLIT_STREAM, seed]).permutation(np.arange(documents, dtype=np.int32))
    bounds = np.rint(np.cumsum(shares) / np.sum(shares) * documents).astype(np.int64)
    return [order[begin:end] for begin, end in zip([0, *bounds[:-1]], bounds)]


@dataclass
class _DatasetConfig(GPTDatasetConfig):
    """GPTDatasetConfig with what the split by random documents needs; part of every cache file's name."""

    shares: tuple[float, ...] = ()
    contents: dict[str, str] | None = None
    """sha256 of the tokens of each prefix."""
    content: str = ""
    """The one of the dataset at hand, so that a dataset written anew under an old name misses the old cache."""


class RandomSplitDataset(GPTDataset):
    """A GPTDataset that is given all documents and keeps the random share of its split."""

    def __init__(
        self,
        dataset: Any,
        path: str,
        documents: np.ndarray,
        num_samples: int | None,
        split: Split,
        config: _DatasetConfig,
    ) -> None:
        own = split_documents(len(documents), list(config.shares), config.random_seed)[split.value]
        config = copy.copy(config)
        config.content = config.contents[path]
        super().__init__(dataset, path, own, num_samples, split, config)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return ["random_seed", "sequence_length", "shares", "content", "tokenizer"]

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loads the cached indices; where they are missing, rank 0 builds them first.

        They are built in a temporary folder and moved, so that a killed job leaves no half of a file to be loaded.
        """
        cache = Path(self.config.path_to_cache)
        if not self._is_cached(cache):
            if dist.is_initialized() and dist.get_rank() != 0:
                raise DataError(
                    f"this rank does not see the sample indices that rank 0 wrote to {cache}; set"
                    " data.cache_dir to a folder that all nodes share"
                )
            try:
                self._fill(cache)
            except OSError as error:
                raise DataError(
                    f"cannot write sample indices to {cache}: {error.strerror}; set data.cache_dir to a"
                    " folder with space that can be written"
                ) from error
        return super()._build_document_sample_shuffle_indices()

    def _fill(self, cache: Path) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as folder:
            self.config.path_to_cache = folder
            super()._build_document_sample_shuffle_indices()
            self.config.path_to_cache = str(cache)
            for file in os.listdir(folder):
                os.replace(os.path.join(folder, file), cache / file)

    def _is_cached(self, cache: Path) -> bool:
        """Whether all four files are there, under the names Megatron-Core gives them."""
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        files = ("description.txt", "document_index.npy", "sample_index.npy", "shuffle_index.npy")
        return all((cache / f"{base}-{file}").is_file() for file in files)


class _Builder(BlendedMegatronDatasetBuilder):
    """Megatron-Core's builder without its collectives: ``open_datasets`` orders the ranks, and agrees on errors."""

    def __init__(self, sizes: tuple[int | None, ...], config: _DatasetConfig) -> None:
        super().__init__(RandomSplitDataset, list(sizes), lambda: True, config)

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list, sizes_per_dataset: list
    ) -> list[list]:
        per_prefix = [
            self._build_megatron_dataset_splits(prefix, split, sizes, synchronize_ranks=False)
            for prefix, sizes in zip(prefixes, sizes_per_dataset)
        ]
        return [list(column) for column in zip(*per_prefix)]

    @staticmethod
    def build_generic_dataset(
        cls: Callable[..., T], is_built_on_rank: Callable, synchronize_ranks: bool, *args: Any
    ) -> T:
        if cls is BlendedDataset:  # quick to build, and without a process group its cache cannot be written
            *args, config = args
            args.append(copy.copy(config))
            args[-1].path_to_cache = None
        return cls(*args)


class _MegatronTokenizer:
    """What Megatron-Core's datasets ask of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eod = tokenizer.eod
        self.unique_identifiers = OrderedDict(fingerprint=tokenizer.fingerprint)


def _build(data: DataConfig, tokenizer: Tokenizer, sizes: tuple[int | None, ...], seed: int) -> Datasets:
    prefixes = find_prefixes(data.path)
    tokens = _split_tokens(prefixes, data, seed)
    contents = {prefix: read_manifest(prefix).bin_sha256 for prefix in prefixes}
    splits: list[Samples | None] = []
    for split, size in zip(Split, sizes):
        if size == 0 or data.split[split.value] == 0:
            splits.append(None)
            continue
        names, weights = _blend(split, prefixes, tokens, data, size)
        config = _DatasetConfig(
            random_seed=seed,
            sequence_length=data.sequence_length,
            blend_per_split=[(names, weights) if each is split else None for each in Split],
            mid_level_dataset_surplus=_surplus(len(names), size),
            path_to_cache=data.cache_dir or str(_folder(data) / "cache"),
            tokenizer=_MegatronTokenizer(tokenizer),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            shares=tuple(data.split),
            contents=contents,
        )
        splits.append(_Builder(sizes, config).build()[split.value])
    return Datasets(*splits)


def _split_tokens(prefixes: list[str], data: DataConfig, seed: int) -> list[list[int]]:
    """Tokens of each prefix (outer) in each split (inner)."""
    result = []
    for prefix in prefixes:
        dataset = indexed_dataset.IndexedDataset(prefix)  # held: its arrays are unmapped with it
        lengths = dataset.sequence_lengths
        result.append(
            [int(lengths[own].sum(dtype=np.int64)) for own in split_documents(len(lengths), data.split, seed)]
        )
    return result


def _blend(
    split: Split, prefixes: list[str], tokens: list[list[int]], data: DataConfig, size: int | None
) -> tuple[list[str], list[float] | None]:
    """(prefixes, weights) of a split. A dataset without one whole sample for it is left out of the blend.

    Raises:
        DataError: no dataset has one.
    """
    own = {prefix: counts[split.value] for prefix, counts in zip(prefixes, tokens)}
    enough = {prefix: count for prefix, count in own.items() if count > data.sequence_length}
    if not enough:
        raise DataError(
            f"the {_NAMES[split]} split of {data.path} has {sum(own.values())} tokens, too few for one sample of"
            f" data.sequence_length {data.sequence_length} (+ 1); raise its share in data.split {data.split},"
            " shorten data.sequence_length or add documents"
        )
    weights = None if size is None or len(enough) == 1 else [float(count) for count in enough.values()]
    return list(enough), weights


def _surplus(datasets: int, size: int | None) -> float:
    """Share of spare samples to build for each dataset of a blend: rounding may draw about one more than its weight."""
    return max(0.005, 2 * datasets / size) if size else 0.0


def _folder(data: DataConfig) -> Path:
    path = Path(data.path)
    return path if path.is_dir() else path.parent


def _agreed(work: Callable[[], T]) -> T:
    """Runs ``work`` on every rank; if it fails on any, all ranks raise, so that none waits for one that is gone."""
    if not dist.is_initialized():
        return work()
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise DataError(f"{message} (rank {rank})")
    return result
