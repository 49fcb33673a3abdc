"""What is in a dataset or blend, as one wants to know it before a long run reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data.blend import BlendEntry, read_blend
from megatron_implicit.data.index_file import read_lengths
from megatron_implicit.data.indexed import check_indexed, dataset_files
from megatron_implicit.data.manifest import Manifest
from megatron_implicit.data.tokenizers import Tokenizer

QUANTILES = (0.0, 0.01, 0.5, 0.99, 1.0)
_BINS_PER_OCTAVE = 4
_BLOCKS = 64
"""Places of a dataset that its vocabulary is sampled at."""
_EXCERPT = 300
"""Characters of a document shown from its begin and from its end."""


@dataclass(frozen=True)
class Inspected:
    """One named dataset of a blend, or the only one."""

    entry: BlendEntry
    prefixes: list[str]
    manifests: list[Manifest]
    length_quantiles: list[int]
    """Tokens of a document at ``QUANTILES``, end of document included."""
    bins: np.ndarray
    """Edges of the histogram, tokens, growing by a constant factor."""
    documents_per_bin: np.ndarray
    tokens_per_bin: np.ndarray

    @property
    def documents(self) -> int:
        return sum(manifest.documents for manifest in self.manifests)

    @property
    def tokens(self) -> int:
        return sum(manifest.tokens for manifest in self.manifests)

    @property
    def text_bytes(self) -> int:
        return sum(manifest.text_bytes for manifest in self.manifests)

    @property
    def skipped(self) -> dict[str, int]:
        """Records of its sources that gave no document, by reason."""
        reasons = {reason for manifest in self.manifests for reason in manifest.skipped}
        return {reason: sum(manifest.skipped.get(reason, 0) for manifest in self.manifests) for reason in reasons}


@dataclass(frozen=True)
class Coverage:
    """How much of the vocabulary occurs."""

    tokens: int
    """Tokens looked at."""
    used: int
    """Ids that occur among them."""
    vocab_size: int
    most_frequent: list[tuple[int, float]]
    """(id, share of the tokens), the most frequent first."""


def inspect_blend(data: DataConfig, tokenizer: Tokenizer) -> list[Inspected]:
    """Counts and lengths of every dataset of ``data.path``. Reads indices, not tokens.

    Raises:
        DataError: one is missing, damaged, or of another tokenizer.
    """
    return [_inspect(entry, tokenizer) for entry in read_blend(data)]


def planned_shares(datasets: list[Inspected]) -> list[float]:
    """Share of a run's samples that each dataset of a blend gives."""
    weights = [
        each.tokens * (each.entry.epochs or 1) if each.entry.weight is None else each.entry.weight for each in datasets
    ]
    return [weight / sum(weights) for weight in weights]


def measure_coverage(datasets: list[Inspected], vocab_size: int, limit: int) -> Coverage:
    """Counts ids in at most ``limit`` tokens, taken in blocks from evenly spaced places of every dataset."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    total = sum(each.tokens for each in datasets)
    for each in datasets:
        for prefix, manifest in zip(each.prefixes, each.manifests):
            for block in _blocks(prefix, manifest, max(1, limit * manifest.tokens // total)):
                counts += np.bincount(block, minlength=vocab_size)
    seen = int(counts.sum())
    frequent = np.argsort(counts)[::-1][:10]
    return Coverage(
        seen, int(np.count_nonzero(counts)), vocab_size, [(int(i), counts[i] / seen) for i in frequent if counts[i]]
    )


def sample_documents(each: Inspected, tokenizer: Tokenizer, count: int, seed: int) -> Iterator[tuple[str, int, str]]:
    """(place, tokens, text) of random documents; of a long one its begin and its end."""
    random = np.random.default_rng(seed)
    sizes = np.cumsum([manifest.documents for manifest in each.manifests])
    for number in sorted(random.choice(sizes[-1], size=min(count, sizes[-1]), replace=False)):
        shard = int(np.searchsorted(sizes, number, side="right"))
        local = int(number - (sizes[shard - 1] if shard else 0))
        ids = _document(each.prefixes[shard], each.manifests[shard], local)
        text = tokenizer.decode(ids[:-1])
        if len(text) > 2 * _EXCERPT:
            text = f"{text[:_EXCERPT]} [...] {text[-_EXCERPT:]}"
        yield f"{each.prefixes[shard]}, document {local}", len(ids), text


def _inspect(entry: BlendEntry, tokenizer: Tokenizer) -> Inspected:
    prefixes = entry.prefixes()
    manifests = [check_indexed(prefix, tokenizer, verify_index=False) for prefix in prefixes]
    lengths = np.concatenate([read_lengths(dataset_files(prefix)[1]) for prefix in prefixes])
    octaves = int(np.log2(lengths.max())) + 1
    bins = 2.0 ** (np.arange(octaves * _BINS_PER_OCTAVE + 1) / _BINS_PER_OCTAVE)
    return Inspected(
        entry,
        prefixes,
        manifests,
        np.quantile(lengths, QUANTILES, method="nearest").astype(int).tolist(),
        bins,
        np.histogram(lengths, bins)[0],
        np.histogram(lengths, bins, weights=lengths)[0],
    )


def _blocks(prefix: str, manifest: Manifest, limit: int) -> Iterator[np.ndarray]:
    tokens = np.memmap(dataset_files(prefix)[0], dtype=manifest.dtype, mode="r")
    if len(tokens) <= limit:
        yield tokens
        return
    size = max(1, limit // _BLOCKS)
    for start in np.linspace(0, len(tokens) - size, _BLOCKS).astype(np.int64):
        yield tokens[start : start + size]


def _document(prefix: str, manifest: Manifest, number: int) -> np.ndarray:
    lengths = read_lengths(dataset_files(prefix)[1])
    start = int(lengths[:number].sum(dtype=np.int64))
    tokens = np.memmap(dataset_files(prefix)[0], dtype=manifest.dtype, mode="r")
    return np.array(tokens[start : start + lengths[number]])
