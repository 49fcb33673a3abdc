"""Documents to samples of fixed length: split at random, shuffled, packed end to end, shuffled again.

A sample is read by Megatron-Core's GPTDataset; its indices are computed here, because

- training sees every token of a split once an epoch: the samples of an epoch come before those of the next, the one
  that reaches over the boundary among the first. The very last one is filled up, without loss;
- the order of the samples does not depend on how many are drawn, so a run can be made longer;
- nothing is computed, and little is read, where the indices are cached: 207B tokens open in seconds.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megatron_implicit.data.index_cache import Arrays, IndexCache
from megatron_implicit.data.index_file import read_lengths
from megatron_implicit.data.indexed import check_indexed, dataset_files
from megatron_implicit.data.manifest import Manifest
from megatron_implicit.data.megatron import GPTDataset, GPTDatasetConfig, Split, helpers, indexed_dataset
from megatron_implicit.data.tokenizers import Tokenizer

_SPLIT_STREAM, _DOCUMENT_STREAM, _SAMPLE_STREAM = 0x5B117, 0xD0C5, 0x5A3B
"""Set the random streams of one seed apart."""


@dataclass(frozen=True)
class SplitDataset:
    """A dataset and how its documents are split."""

    prefix: str
    manifest: Manifest
    shares: tuple[float, ...]
    """Of train, validation and test."""
    seed: int

    def description(self) -> dict:
        """What its splits depend on: contents, not names."""
        contents = {"bin": self.manifest.bin_sha256, "idx": self.manifest.idx_sha256}
        return {**contents, "shares": list(self.shares), "seed": self.seed}

    def tokens(self, cache: IndexCache) -> list[int]:
        """Tokens of the three splits. Reads all of the index, and checks it, where they are not cached."""
        return [int(count) for count in cache.get("split", self.description(), self._count_tokens)["tokens"]]

    def _count_tokens(self) -> Arrays:
        check_indexed(self.prefix, verify_index=True)
        lengths = np.array(read_lengths(dataset_files(self.prefix)[1]))
        own = split_documents(len(lengths), self.shares, self.seed)
        return {"tokens": np.array([lengths[documents].sum(dtype=np.int64) for documents in own])}


@dataclass(frozen=True)
class Packing:
    """The samples of one split of a dataset."""

    split: str
    """train, validation or test."""
    sequence_length: int
    tokens: int
    """Of the split, once."""
    epochs: int
    """How often its documents are gone through."""

    @property
    def samples(self) -> int:
        """Samples of all epochs, the last one filled up; each begins a sequence length after the one before."""
        return samples_in(self.tokens * self.epochs, self.sequence_length)


def samples_in(tokens: int, sequence_length: int) -> int:
    """Samples that hold ``tokens`` tokens, where the last token of one is the first of the next."""
    return math.ceil(max(tokens - 1, 0) / sequence_length)


def epochs_for(samples: int, tokens: int, sequence_length: int) -> int:
    """Epochs of ``tokens`` tokens that give at least ``samples`` samples."""
    epochs = max(1, samples * sequence_length // tokens)
    while samples_in(epochs * tokens, sequence_length) < samples:
        epochs += 1
    return epochs


def split_documents(documents: int, shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Document numbers (int32, in random order) of train, validation and test: disjoint, together all of them.

    Depends on the number of documents, not on their tokens: another tokenizer gives the same split.
    """
    order = np.random.default_rng([_SPLIT_STREAM, seed]).permutation(np.arange(documents, dtype=np.int32))
    bounds = np.rint(np.cumsum(shares) / np.sum(shares) * documents).astype(np.int64)
    return [order[begin:end] for begin, end in zip([0, *bounds[:-1]], bounds)]


class PackedDataset(GPTDataset):
    """The samples of a ``Packing``, in training order: dicts of tokens, labels, position_ids and loss_mask [s]."""

    def __init__(self, dataset: SplitDataset, packing: Packing, tokenizer: Tokenizer, cache: IndexCache) -> None:
        """Opens the cached indices, or builds them. Raises DataError where neither can be done."""
        description = {**dataset.description(), **asdict(packing)}
        self._arrays = cache.get("samples", description, lambda: _build(dataset, packing))
        config = GPTDatasetConfig(
            random_seed=dataset.seed,
            sequence_length=packing.sequence_length,
            blend=([dataset.prefix], None),
            split="1",
            tokenizer=_MegatronTokenizer(tokenizer),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        indexed = indexed_dataset.IndexedDataset(dataset.prefix)
        _expect_random_access(
            *self._arrays.values(), indexed.index.bin_buffer_mmap, indexed.bin_reader._bin_buffer_mmap
        )
        super().__init__(indexed, dataset.prefix, None, None, Split.train, config)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._arrays["documents"], self._arrays["samples"], self._arrays["shuffle"]


def _expect_random_access(*arrays: np.memmap) -> None:
    """Keeps the kernel from reading ahead: samples lie anywhere, and 128 kB are read for the 4 that are asked for."""
    for array in arrays:
        array._mmap.madvise(mmap.MADV_RANDOM)


class _MegatronTokenizer:
    """What Megatron-Core's datasets ask of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eod = tokenizer.eod
        self.unique_identifiers = {"fingerprint": tokenizer.fingerprint}


def _build(dataset: SplitDataset, packing: Packing) -> Arrays:
    """documents [epochs * n] int32: the order of documents; samples [m + 1, 2]: place in it and offset where each
    sample begins; shuffle [m]: the order of samples."""
    lengths = np.array(read_lengths(dataset_files(dataset.prefix)[1]))
    number = ("train", "validation", "test").index(packing.split)
    own = split_documents(len(lengths), dataset.shares, dataset.seed)[number]
    orders = [
        np.random.default_rng([_DOCUMENT_STREAM, dataset.seed, number, epoch]).permutation(own)
        for epoch in range(packing.epochs)
    ]
    documents = np.concatenate(orders)
    samples = helpers.build_sample_idx(
        lengths, documents, packing.sequence_length, packing.epochs, packing.tokens, False, True
    )
    return {"documents": documents, "samples": samples, "shuffle": _shuffle(dataset.seed, number, packing)}


def _shuffle(seed: int, number: int, packing: Packing) -> np.ndarray:
    """A permutation of the samples that keeps each among those whose first label is of the same epoch."""
    dtype = np.uint32 if packing.samples < 2**32 else np.int64
    parts = []
    for epoch in range(packing.epochs):
        start, stop = (samples_in(count * packing.tokens, packing.sequence_length) for count in (epoch, epoch + 1))
        random = np.random.default_rng([_SAMPLE_STREAM, seed, number, epoch])
        parts.append(random.permutation(np.arange(start, stop, dtype=dtype)))
    return np.concatenate(parts)
