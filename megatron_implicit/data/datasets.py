"""Train, validation and test samples of fixed length: what ``data.path`` names, split by random documents and blended.

Indices are cached on disk by rank 0 and memory-mapped by all. No global random state is read or changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data.blend import BlendEntry, is_blend, read_blend
from megatron_implicit.data.index_cache import Arrays, IndexCache
from megatron_implicit.data.indexed import check_indexed
from megatron_implicit.data.megatron import helpers
from megatron_implicit.data.packing import PackedDataset, Packing, SplitDataset, epochs_for, split_documents
from megatron_implicit.data.sampling import Samples
from megatron_implicit.data.tokenizers import Tokenizer, load_tokenizer
from megatron_implicit.errors import DataError

__all__ = ["Datasets", "open_datasets", "open_tokenizer", "split_documents", "tokenizer_file"]

T = TypeVar("T")

SPLITS = ("train", "validation", "test")


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
    """The tokenizer of ``tokenizer_file``.

    Raises:
        DataError: there is no such file, no dataset, or it cannot be read.
    """
    return load_tokenizer(tokenizer_file(data))


def tokenizer_file(data: DataConfig) -> Path:
    """The file ``data.tokenizer``, or the one beside the dataset: tokenizer.model or tokenizer.json.

    Raises:
        DataError: there is none beside the dataset, or no dataset.
    """
    if data.tokenizer is not None:
        return Path(data.tokenizer)
    folders = [_folder(data.path)]
    if is_blend(data.path):
        folders += [_folder(entry.path) for entry in read_blend(data)]
    for folder in folders:
        for name in ("tokenizer.model", "tokenizer.json"):
            if (folder / name).exists():
                return folder / name
    for entry in read_blend(data):
        entry.prefixes()  # where the dataset itself is missing, this says so
    raise DataError(
        f"no tokenizer.model or tokenizer.json in {folders[0]}; put the dataset's tokenizer there or set data.tokenizer"
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
            as needed; None draws each document once (in training: as often as its ``epochs`` say); 0 leaves the split
            out. The order of the samples does not depend on the number.
        seed: of split and order.

    Raises:
        DataError: missing, damaged or foreign files, a split too small for one sample, or more training samples than
            the epochs of a blend allow.
    """
    sizes = dict(zip(SPLITS, (train_samples, validation_samples, test_samples)))
    first = not dist.is_initialized() or dist.get_rank() == 0

    def build(may_build: bool) -> Datasets:
        return _Opening(data, tokenizer, seed, may_build).open(sizes)

    datasets = _agreed(lambda: build(may_build=True) if first else None)
    return _agreed(lambda: datasets if datasets is not None else build(may_build=False))


class Blended:
    """Samples of several datasets in one order. An item also has dataset_id, the number of its dataset."""

    def __init__(self, parts: list[PackedDataset], order: Arrays) -> None:
        self._parts, self._order = parts, order

    def __len__(self) -> int:
        return len(self._order["part"])

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]:
        number = int(self._order["part"][index])
        return {"dataset_id": number, **self._parts[number][int(self._order["sample"][index])]}


@dataclass(frozen=True)
class _Part:
    """One dataset on disk, as a part of a split."""

    entry: BlendEntry
    dataset: SplitDataset
    tokens: int
    """Of the split, once."""
    weight: float
    """Share of the split's samples."""


class _Opening:
    """What ``open_datasets`` needs to know everywhere."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, seed: int, may_build: bool) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._cache = IndexCache(Path(data.cache_dir or _folder(data.path) / "cache"), may_build)
        self._datasets = [
            (entry, [self._checked(prefix, entry, seed) for prefix in entry.prefixes()]) for entry in read_blend(data)
        ]

    def open(self, sizes: Mapping[str, int | None]) -> Datasets:
        return Datasets(**{split: self._open_split(split, size) for split, size in sizes.items()})

    def _checked(self, prefix: str, entry: BlendEntry, seed: int) -> SplitDataset:
        manifest = check_indexed(prefix, self._tokenizer, verify_index=False)
        return SplitDataset(prefix, manifest, entry.split, seed)

    def _open_split(self, split: str, size: int | None) -> Samples | None:
        number = SPLITS.index(split)
        if size == 0 or all(entry.split[number] == 0 for entry, _ in self._datasets):
            return None
        parts = self._parts(number)
        if len(parts) == 1:
            return self._packed(parts[0], split, size)
        if size is None:
            packed = [self._packed(part, split, None) for part in parts]
            return Blended(packed, self._order("all", {"sizes": [len(each) for each in packed]}, _interleaved))
        weights = [part.weight for part in parts]
        order = self._order("weighted", {"weights": weights, "size": size}, _weighted)
        drawn = zip(parts, order["drawn"])
        return Blended([self._packed(part, split, int(count)) for part, count in drawn], order)

    def _parts(self, number: int) -> list[_Part]:
        """The datasets that have at least one whole sample of a split, with weights that add up to 1."""
        parts = []
        for entry, datasets in self._datasets:
            tokens = [dataset.tokens(self._cache)[number] for dataset in datasets]
            pairs = zip(datasets, tokens)
            usable = [(dataset, count) for dataset, count in pairs if count > self._data.sequence_length]
            total = sum(count for _, count in usable)
            weight = total * (entry.epochs or 1) if entry.weight is None else entry.weight
            parts += [_Part(entry, dataset, count, weight * count / total) for dataset, count in usable]
        if not parts:
            raise DataError(
                f"the {SPLITS[number]} split of {self._data.path} has too few tokens for one sample of"
                f" data.sequence_length {self._data.sequence_length} (+ 1); raise its share in data.split"
                f" {self._data.split}, shorten data.sequence_length or add documents"
            )
        total = sum(part.weight for part in parts)
        return [_Part(part.entry, part.dataset, part.tokens, part.weight / total) for part in parts]

    def _packed(self, part: _Part, split: str, size: int | None) -> PackedDataset:
        """A part with at least ``size`` samples; with None those of its epochs."""
        length, limit = self._data.sequence_length, part.entry.epochs if split == "train" else None
        epochs = (limit or 1) if size is None else epochs_for(max(size, 1), part.tokens, length)
        if limit is not None and epochs > limit:
            raise DataError(
                f"the run draws {size:,} samples of {part.dataset.prefix}, which is more than the epochs: {limit} of"
                f" dataset {part.entry.name} in {self._data.path} give; shorten the run, or raise epochs to {epochs}"
            )
        packing = Packing(split, length, part.tokens, epochs)
        return PackedDataset(part.dataset, packing, self._tokenizer, self._cache)

    def _order(self, kind: str, description: dict, build: Callable[..., Arrays]) -> Arrays:
        return self._cache.get("blend", {"kind": kind, **description}, lambda: build(**description))


def _weighted(weights: list[float], size: int) -> Arrays:
    """part [n] int16 and sample [n] int64 of every sample, each part as near to its weight as can be at any moment.

    drawn [parts] is how many samples of each part that takes.
    """
    part, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(part, sample, weights, len(weights), size, False)
    return {"part": part, "sample": sample, "drawn": np.bincount(part, minlength=len(weights))}


def _interleaved(sizes: list[int]) -> Arrays:
    """The same for all samples of all parts, evenly mixed."""
    part, sample = np.zeros(sum(sizes), np.int16), np.zeros(sum(sizes), np.int64)
    helpers.build_exhaustive_blending_indices(part, sample, sizes, len(sizes))
    return {"part": part, "sample": sample}


def _folder(path: str) -> Path:
    """Where tokenizer and cache of a dataset, folder or blend are looked for."""
    return Path(path) if Path(path).is_dir() else Path(os.path.abspath(path)).parent


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
