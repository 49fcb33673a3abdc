"""Indexed datasets: writing NAME.bin and NAME.idx through Megatron-Core, and opening them with checks.

Beside the two files lies a manifest, NAME.json. It is written last, so a dataset without one was never finished.
Everything is written under a temporary name, made durable, and moved.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Union

import numpy as np

from megatron_implicit.data.tokenizers import Tokenizer
from megatron_implicit.errors import DataError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

PathLike = Union[str, "os.PathLike[str]"]

FORMAT = 1
"""Version of the manifest."""

_HEADER = struct.Struct("<9sQBQQ")
"""Start of an .idx file: magic, version, code of the token type, sequences, entries of the document table."""
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES = {4: "int32", 8: "uint16"}
_BYTES_PER_SEQUENCE = 4 + 8
"""Of the .idx file: an int32 length and an int64 offset."""
_BYTES_PER_DOCUMENT_ENTRY = 8

_REMEDY = "write it again with tools/preprocess_data.py --overwrite"


@dataclass(frozen=True)
class Source:
    """A file that a dataset was made from."""

    name: str
    """File name without folders, so that a moved corpus is still the same."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What NAME.json says about NAME.bin and NAME.idx. Holds no time and no path: equal inputs give equal manifests."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: int
    eod: int
    """Id at the end of every document."""
    documents: int
    tokens: int
    """Ends of documents included."""
    dtype: str
    """numpy name of the type of one token in the .bin file."""
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    empty_documents: int = 0
    """Documents of the sources that had no text and were left out."""
    sources: list[Source] = field(default_factory=list)
    format: int = FORMAT


def dataset_files(prefix: PathLike) -> tuple[Path, Path, Path]:
    """The .bin file, .idx file and manifest of the dataset ``prefix`` (a path without suffix)."""
    base = os.fspath(prefix)
    return Path(base + ".bin"), Path(base + ".idx"), Path(base + ".json")


def read_manifest(prefix: PathLike) -> Manifest:
    """The manifest of dataset ``prefix``.

    Raises:
        DataError: it is missing or damaged.
    """
    path = dataset_files(prefix)[2]
    try:
        fields = json.loads(path.read_bytes())
        sources = [Source(**source) for source in fields.pop("sources")]
        manifest = Manifest(sources=sources, **fields)
    except FileNotFoundError as error:
        raise DataError(
            f"dataset {os.fspath(prefix)} is missing or was never finished (no {path}); write it with"
            " tools/preprocess_data.py"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"manifest {path} is damaged; {_REMEDY}") from error
    if manifest.format != FORMAT:
        raise DataError(f"manifest {path} has format {manifest.format}, this version reads {FORMAT}; {_REMEDY}")
    return manifest


class IndexedDatasetWriter:
    """Writes one dataset; use as a context manager and call ``finish``. Without it nothing is left behind.

    with IndexedDatasetWriter("data/corpus", tokenizer) as writer:
        writer.add_document(tokenizer.encode(text))
        manifest = writer.finish(sources)
    """

    def __init__(self, prefix: PathLike, tokenizer: Tokenizer) -> None:
        """Writes under temporary names; what lies under the final ones stays untouched until ``finish``."""
        self._final = dataset_files(prefix)
        self._partial = [path.with_name(path.name + ".partial") for path in self._final]
        self._tokenizer = tokenizer
        self._hash = hashlib.sha256()
        self.documents = 0
        self.tokens = 0
        self.empty_documents = 0

    @functools.cached_property
    def _builder(self) -> IndexedDatasetBuilder:
        """Opened with the first document: bad input is then reported before Megatron-Core's import of seconds."""
        from megatron_implicit.data.megatron import indexed_dataset

        self._final[0].parent.mkdir(parents=True, exist_ok=True)
        dtype = indexed_dataset.DType.optimal_dtype(self._tokenizer.vocab_size)
        return indexed_dataset.IndexedDatasetBuilder(os.fspath(self._partial[0]), dtype=dtype)

    def add_document(self, ids: Sequence[int]) -> None:
        """Appends a document and its end. A document without tokens is counted and left out."""
        if not len(ids):
            self.empty_documents += 1
            return
        document = np.empty(len(ids) + 1, dtype=self._builder.dtype)
        document[:-1] = ids
        document[-1] = self._tokenizer.eod
        self._builder.add_document(document, [document.size])
        self._hash.update(document.tobytes())
        self.documents += 1
        self.tokens += document.size

    def finish(self, sources: Sequence[Source] = ()) -> Manifest:
        """Writes index and manifest, makes all durable and moves them to their names.

        Raises:
            DataError: there was no document with text.
        """
        if not self.documents:
            raise DataError(f"no document with text for {self._final[0]}; check the input files")
        bin_partial, idx_partial, manifest_partial = self._partial
        self._builder.finalize(os.fspath(idx_partial))
        manifest = Manifest(
            tokenizer=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            eod=self._tokenizer.eod,
            documents=self.documents,
            tokens=self.tokens,
            dtype=np.dtype(self._builder.dtype).name,
            bin_bytes=bin_partial.stat().st_size,
            bin_sha256=self._hash.hexdigest(),
            idx_bytes=idx_partial.stat().st_size,
            idx_sha256=file_sha256(idx_partial),
            empty_documents=self.empty_documents,
            sources=list(sources),
        )
        manifest_partial.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        self._publish()
        return manifest

    def _publish(self) -> None:
        """Moves the files to their names; at no moment does a manifest lie beside files it does not describe."""
        folder = self._final[0].parent
        for path in self._partial:
            _sync(path)
        self._final[2].unlink(missing_ok=True)
        _sync(folder)
        for partial, final in zip(self._partial, self._final):
            os.replace(partial, final)
        _sync(folder)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "_builder" in self.__dict__:
            self._builder.data_file.close()
        for path in self._partial:
            path.unlink(missing_ok=True)


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
    manifest = read_manifest(prefix)
    bin_path, idx_path, manifest_path = dataset_files(prefix)
    for path, expected in ((bin_path, manifest.bin_bytes), (idx_path, manifest.idx_bytes)):
        _check_size(path, expected, manifest_path)
    _check_header(idx_path, manifest)
    if verify_index and file_sha256(idx_path) != manifest.idx_sha256:
        raise DataError(f"{idx_path} is corrupt: its sha256 is not the one in {manifest_path.name}; {_REMEDY}")
    if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer:
        raise DataError(
            f"dataset {os.fspath(prefix)} was made with another tokenizer"
            f" ({_tokenizer_words(manifest.vocab_size, manifest.tokenizer)};"
            f" given {_tokenizer_words(tokenizer.vocab_size, tokenizer.fingerprint)}); set data.tokenizer to"
            f" the one it was made with, or {_REMEDY}"
        )
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
        raise DataError(f"cannot read {path}: {error.strerror}; {_REMEDY}") from error
    if actual != expected:
        word = "truncated" if actual < expected else "longer than it was written"
        raise DataError(f"{path} is {word}: {actual} bytes, {manifest_path.name} says {expected}; {_REMEDY}")


def _check_header(idx_path: Path, manifest: Manifest) -> None:
    """The index's own counts must fit its size, the .bin file's size and the manifest."""
    with open(idx_path, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{idx_path} is corrupt: not an index file; {_REMEDY}")
    _, version, code, sequences, entries = _HEADER.unpack(header)
    expected_size = _HEADER.size + sequences * _BYTES_PER_SEQUENCE + entries * _BYTES_PER_DOCUMENT_ENTRY
    dtype = _DTYPE_CODES.get(code)
    fits = (
        version == 1
        and dtype == manifest.dtype
        and sequences == manifest.documents
        and entries == manifest.documents + 1
        and expected_size == manifest.idx_bytes
        and manifest.tokens * np.dtype(manifest.dtype).itemsize == manifest.bin_bytes
    )
    if not fits:
        raise DataError(
            f"{idx_path} is corrupt: its header (type {dtype}, {sequences} documents) does not fit the"
            f" manifest; {_REMEDY}"
        )


def _tokenizer_words(vocab_size: int, fingerprint: str) -> str:
    return f"{vocab_size} entries, fingerprint {fingerprint[:12]}"


def _sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
