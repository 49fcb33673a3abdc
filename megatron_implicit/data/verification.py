"""Checks a finished dataset against its manifest by reading all of it again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_implicit.data.index_file import index_problems, read_header, read_lengths
from megatron_implicit.data.indexed import file_sha256
from megatron_implicit.data.manifest import Manifest, PathLike, Source, dataset_files, read_manifest
from megatron_implicit.data.shards import RESERVED_NAMES
from megatron_implicit.errors import DataError

_BLOCK = 1 << 22
"""Tokens read at once."""


@dataclass
class Verification:
    """What was counted in a dataset, and what does not fit its manifest."""

    documents: int = 0
    tokens: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether everything fits."""
        return not self.problems


def all_prefixes(path: PathLike) -> list[str]:
    """Prefixes of all datasets in a folder, unfinished and empty ones too, by name; or ``path``, a prefix, itself.

    Raises:
        DataError: there is none.
    """
    folder = Path(path)
    if not folder.is_dir():
        read_manifest(path)
        return [os.fspath(path)]
    names = {file.with_suffix("") for suffix in (".bin", ".idx", ".json") for file in folder.glob(f"*{suffix}")}
    prefixes = sorted(os.fspath(name) for name in names if name.name not in RESERVED_NAMES)
    if not prefixes:
        raise DataError(f"no dataset in folder {folder}; name one written by tools/preprocess_data.py")
    return prefixes


def verify_dataset(prefix: PathLike) -> Verification:
    """Re-reads .bin and .idx of one dataset: checksums, counts, ends of documents, ids, offsets."""
    try:
        manifest = read_manifest(prefix)
    except DataError as error:
        return Verification(problems=[str(error)])
    found = Verification()
    if not manifest.documents:
        return found
    bin_path, idx_path, _ = dataset_files(prefix)
    try:
        _verify_tokens(bin_path, manifest, found)
        _verify_index(idx_path, bin_path, manifest, found)
    except OSError as error:
        found.problems.append(f"cannot read {error.filename}: {error.strerror}")
    return found


def verify_sources(prefixes: Sequence[PathLike], sources: Sequence[Path]) -> list[str]:
    """What does not fit between the source files given and those that the datasets' manifests name."""
    if not sources:
        return []
    known: dict[str, Source] = {}
    for prefix in prefixes:
        known |= {source.name: source for source in read_manifest(prefix).sources}
    absent = sorted(known.keys() - {path.name for path in sources})
    problems = [f"{name} is in a manifest but not among the inputs" for name in absent]
    for path in sources:
        if path.name not in known:
            problems.append(f"{path} is in no manifest: it has not been prepared")
        elif file_sha256(path) != known[path.name].sha256:
            problems.append(f"{path} is not the file that was prepared: its sha256 differs")
    return problems


def _verify_tokens(path: Path, manifest: Manifest, found: Verification) -> None:
    dtype = np.dtype(manifest.dtype)
    digest, largest = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK * dtype.itemsize):
            digest.update(block)
            tokens = np.frombuffer(block[: len(block) // dtype.itemsize * dtype.itemsize], dtype=dtype)
            found.tokens += tokens.size
            found.documents += int(np.count_nonzero(tokens == manifest.eod))
            largest = max(largest, int(tokens.max(initial=0)))
    complain = _complainer(path, found)
    complain(digest.hexdigest() == manifest.bin_sha256, "its sha256 is not the manifest's")
    complain(found.tokens == manifest.tokens, f"{found.tokens} tokens, the manifest says {manifest.tokens}")
    complain(found.documents == manifest.documents, f"{found.documents} ends of documents, not {manifest.documents}")
    complain(largest < manifest.vocab_size, f"token {largest} is outside the vocabulary of {manifest.vocab_size}")


def _verify_index(path: Path, bin_path: Path, manifest: Manifest, found: Verification) -> None:
    complain = _complainer(path, found)
    complain(file_sha256(path) == manifest.idx_sha256, "its sha256 is not the manifest's")
    header = read_header(path)
    if header is None or header.file_bytes != path.stat().st_size or header.sequences != manifest.documents:
        complain(False, "its header does not fit the file or the manifest")
        return
    lengths = read_lengths(path)
    dtype = np.dtype(manifest.dtype)
    for problem in index_problems(path, lengths, dtype.itemsize):
        complain(False, problem)
    ends = np.cumsum(lengths, dtype=np.int64)
    if int(ends[-1]) != found.tokens or lengths.min() < 2:
        complain(False, f"its lengths add up to {int(ends[-1])} tokens, the .bin file holds {found.tokens}")
        return
    tokens = np.memmap(bin_path, dtype=dtype, mode="r")
    complain(bool((tokens[ends - 1] == manifest.eod).all()), "a document does not end with the end of document")


def _complainer(path: Path, found: Verification) -> Callable[[bool, str], None]:
    def complain(fits: bool, problem: str) -> None:
        if not fits:
            found.problems.append(f"{path}: {problem}; write it again with tools/preprocess_data.py")

    return complain
