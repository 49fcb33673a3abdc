"""Indexed datasets in Megatron-Core's format: NAME.bin and NAME.idx, written and opened with checks; NAME.json beside.

The writer makes the same bytes as Megatron-Core's IndexedDatasetBuilder without importing it: preparing data starts in
a fraction of a second and needs no torch.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_implicit.data.corpus import Reading
from megatron_implicit.data.index_file import read_header, token_dtype, write_index
from megatron_implicit.data.manifest import (
    REMEDY,
    Manifest,
    PathLike,
    SkippedRecords,
    Source,
    dataset_files,
    read_manifest,
)
from megatron_implicit.data.publishing import PartialDataset
from megatron_implicit.data.tokenizers import Tokenizer
from megatron_implicit.errors import DataError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

_BUFFER = 1 << 20
"""Bytes of the .bin file written at once."""


class IndexedDatasetWriter:
    """Writes one dataset; use as a context manager and call ``finish``. Without it nothing is left behind.

    with IndexedDatasetWriter("data/corpus", tokenizer) as writer:
        writer.add_document(tokenizer.encode(text))
        manifest = writer.finish(sources)
    """

    def __init__(self, prefix: PathLike, tokenizer: Tokenizer) -> None:
        """Writes under temporary names; what lies under the final ones stays untouched until ``finish``."""
        self._prefix = prefix
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._lengths = array.array("i")
        self._hash = hashlib.sha256()
        self.tokens = 0
        self.skipped = SkippedRecords()
        """Records of the sources that gave no document."""

    @property
    def documents(self) -> int:
        """Documents so far."""
        return len(self._lengths)

    def add_document(self, ids: Sequence[int]) -> None:
        """Appends a document and its end."""
        document = np.empty(len(ids) + 1, dtype=self._dtype)
        document[:-1] = ids
        document[-1] = self._tokenizer.eod
        self._file.write(document)
        self._hash.update(document)
        self._lengths.append(document.size)
        self.tokens += document.size

    def finish(self, sources: Sequence[Source] = (), reading: Reading = Reading(), text_bytes: int = 0) -> Manifest:
        """Writes index and manifest, makes all durable and moves them to their names.

        A dataset without documents gets a manifest only.
        """
        self._file.close()
        write_index(self._partial.idx, np.frombuffer(self._lengths, dtype=np.int32), self._dtype)
        manifest = Manifest(
            tokenizer=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            eod=self._tokenizer.eod,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=text_bytes,
            dtype=self._dtype.name,
            bin_bytes=self._partial.bin.stat().st_size,
            bin_sha256=self._hash.hexdigest(),
            idx_bytes=self._partial.idx.stat().st_size,
            idx_sha256=file_sha256(self._partial.idx),
            sources=list(sources),
            reading=reading,
            skipped=self.skipped.counts,
            skipped_records=self.skipped.listed,
        )
        self._partial.publish(manifest)
        return manifest

    def __enter__(self) -> IndexedDatasetWriter:
        self._partial = PartialDataset(self._prefix)
        self._file = open(self._partial.bin, "wb", buffering=_BUFFER)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk has been reported; closing would report it again
            self._file.close()
        self._partial.__exit__()


def open_indexed(prefix: PathLike, tokenizer: Tokenizer | None = None, *, verify_index: bool = True) -> IndexedDataset:
    """Opens dataset ``prefix`` memory-mapped, after checking it (see ``check_indexed``).

    Hold on to what is returned while its arrays are in use: they are unmapped with it, and reading them then crashes.
    """
    from megatron_implicit.data.megatron import indexed_dataset

    check_indexed(prefix, tokenizer, verify_index=verify_index)
    return indexed_dataset.IndexedDataset(os.fspath(prefix))


def check_indexed(prefix: PathLike, tokenizer: Tokenizer | None = None, *, verify_index: bool = True) -> Manifest:
    """Checks that dataset ``prefix`` is complete, undamaged and made with ``tokenizer`` (when one is given).

    Reads the manifest, file sizes and the index header; with ``verify_index`` all of the .idx file, against its sha256.

    Raises:
        DataError: naming the file and the remedy.
    """
    manifest = check_sizes(prefix)
    if not manifest.documents:
        raise DataError(f"dataset {os.fspath(prefix)} has no documents; leave it out")
    _, idx_path, manifest_path = dataset_files(prefix)
    _check_header(idx_path, manifest)
    if verify_index and file_sha256(idx_path) != manifest.idx_sha256:
        raise DataError(f"{idx_path} is corrupt: its sha256 is not the one in {manifest_path.name}; {REMEDY}")
    if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer:
        raise DataError(
            f"dataset {os.fspath(prefix)} was made with another tokenizer"
            f" ({_tokenizer_words(manifest.vocab_size, manifest.tokenizer)};"
            f" given {_tokenizer_words(tokenizer.vocab_size, tokenizer.fingerprint)}); set data.tokenizer to"
            f" the one it was made with, or {REMEDY}"
        )
    return manifest


def check_sizes(prefix: PathLike) -> Manifest:
    """The manifest of dataset ``prefix``, whose files are there and as long as it says.

    Raises:
        DataError: naming the file and the remedy.
    """
    manifest = read_manifest(prefix)
    bin_path, idx_path, manifest_path = dataset_files(prefix)
    if manifest.documents:
        _check_size(bin_path, manifest.bin_bytes, manifest_path)
        _check_size(idx_path, manifest.idx_bytes, manifest_path)
    return manifest


def find_prefixes(path: PathLike) -> list[str]:
    """Prefixes of the datasets in folder ``path``, sorted by name, or ``path`` itself where it is a prefix.

    Raises:
        DataError: nothing there.
    """
    folder = Path(path)
    if not folder.is_dir():
        if any(file.exists() for file in dataset_files(path)):
            return [os.path.abspath(path)]
        raise DataError(
            f"no dataset at data.path {os.fspath(path)}; write one with tools/preprocess_data.py, or set"
            " data.path to a folder or prefix that exists"
        )
    names = {file.with_suffix("") for suffix in ("*.bin", "*.idx") for file in folder.glob(suffix)}
    if not names:
        raise DataError(
            f"no dataset (NAME.bin, NAME.idx) in folder {folder}; write one with tools/preprocess_data.py"
            f" --output {folder / 'corpus'}"
        )
    return sorted(os.path.abspath(name) for name in names)


def dataset_fingerprint(path: PathLike) -> str:
    """sha256 (hex) of the contents, names and order of the datasets at ``path`` (folder or prefix).

    Reads manifests only. A checkpoint keeps it; a resume compares it.
    """
    digest = hashlib.sha256()
    for prefix in find_prefixes(path):
        manifest = read_manifest(prefix)
        parts = (os.path.basename(prefix), manifest.tokenizer, manifest.bin_sha256, manifest.idx_sha256)
        digest.update(("\0".join(parts) + "\n").encode("utf-8"))
    return digest.hexdigest()


def file_sha256(path: PathLike) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(path: Path, expected: int, manifest_path: Path) -> None:
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {REMEDY}") from error
    if actual != expected:
        word = "truncated" if actual < expected else "longer than it was written"
        raise DataError(f"{path} is {word}: {actual} bytes, {manifest_path.name} says {expected}; {REMEDY}")


def _check_header(idx_path: Path, manifest: Manifest) -> None:
    """The index's own counts must fit its size, the .bin file's size and the manifest."""
    header = read_header(idx_path)
    if header is None:
        raise DataError(f"{idx_path} is corrupt: not an index file; {REMEDY}")
    fits = (
        header.dtype == manifest.dtype
        and header.sequences == manifest.documents
        and header.entries == manifest.documents + 1
        and header.file_bytes == manifest.idx_bytes
        and manifest.tokens * np.dtype(manifest.dtype).itemsize == manifest.bin_bytes
    )
    if not fits:
        raise DataError(
            f"{idx_path} is corrupt: its header (type {header.dtype}, {header.sequences} documents) does not fit the"
            f" manifest; {REMEDY}"
        )


def _tokenizer_words(vocab_size: int, fingerprint: str) -> str:
    return f"{vocab_size} entries, fingerprint {fingerprint[:12]}"
