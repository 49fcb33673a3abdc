"""Several indexed datasets as one, document after document: the bytes that preparing all their sources gives."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_implicit.data.index_file import read_lengths, write_index
from megatron_implicit.data.indexed import check_sizes, file_sha256
from megatron_implicit.data.manifest import Manifest, PathLike, SkippedRecords, dataset_files
from megatron_implicit.data.publishing import PartialDataset
from megatron_implicit.errors import DataError

_BLOCK = 1 << 22
"""Bytes copied at once."""


def merge_datasets(prefixes: Sequence[PathLike], output: PathLike) -> Manifest:
    """Writes the documents of ``prefixes``, in this order, as the dataset ``output``.

    Raises:
        DataError: one is unfinished, damaged or of another recipe, or none has a document; nothing is left behind.
    """
    manifests = [check_sizes(prefix) for prefix in prefixes]
    _refuse_strangers(prefixes, manifests)
    filled = [dataset_files(prefix) for prefix, manifest in zip(prefixes, manifests) if manifest.documents]
    if not filled:
        raise DataError(f"no document with text for {os.fspath(output)}; check the input files")
    first, skipped = manifests[0], SkippedRecords()
    for manifest in manifests:
        skipped.extend(manifest)
    with PartialDataset(output) as partial:
        bin_sha256 = _concatenate([files[0] for files in filled], partial.bin)
        lengths = np.concatenate([read_lengths(files[1]) for files in filled])
        write_index(partial.idx, lengths, np.dtype(first.dtype))
        merged = Manifest(
            tokenizer=first.tokenizer,
            vocab_size=first.vocab_size,
            eod=first.eod,
            documents=len(lengths),
            tokens=sum(manifest.tokens for manifest in manifests),
            text_bytes=sum(manifest.text_bytes for manifest in manifests),
            dtype=first.dtype,
            bin_bytes=partial.bin.stat().st_size,
            bin_sha256=bin_sha256,
            idx_bytes=partial.idx.stat().st_size,
            idx_sha256=file_sha256(partial.idx),
            sources=[source for manifest in manifests for source in manifest.sources],
            reading=first.reading,
            skipped=skipped.counts,
            skipped_records=skipped.listed,
        )
        partial.publish(merged)
    return merged


def _refuse_strangers(prefixes: Sequence[PathLike], manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for prefix, manifest in zip(prefixes, manifests):
        if (manifest.tokenizer, manifest.reading) != (first.tokenizer, first.reading):
            raise DataError(
                f"{os.fspath(prefix)} was made with another tokenizer or other options than {os.fspath(prefixes[0])};"
                " merge only datasets that were made alike"
            )


def _concatenate(paths: Sequence[Path], output: Path) -> str:
    """Joins the files; returns the sha256 of the result."""
    digest = hashlib.sha256()
    with open(output, "wb") as target:
        for path in paths:
            with open(path, "rb") as source:
                while block := source.read(_BLOCK):
                    target.write(block)
                    digest.update(block)
    return digest.hexdigest()
