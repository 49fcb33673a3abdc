"""The .idx file of Megatron-Core's indexed datasets, one sequence a document: written, and read memory-mapped.

34 bytes of header (magic, version, code of the token type, sequences, entries of the document table), then int32
lengths in tokens, int64 offsets in bytes, and the int64 document table 0, 1, ..., n.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES = {4: "int32", 8: "uint16"}
_CHUNK = 1 << 20
"""Documents handled at once."""


@dataclass(frozen=True)
class IndexHeader:
    """Start of an .idx file."""

    dtype: str | None
    """numpy name of the token type; None for one that is not written here."""
    sequences: int
    entries: int
    """Of the document table: documents + 1."""

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return HEADER.size + self.sequences * (4 + 8) + self.entries * 8


def token_dtype(vocab_size: int) -> np.dtype:
    """Type of a token in the .bin file: Megatron-Core's choice."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Writes the index of documents of ``lengths`` tokens (int32, end of document included) that lie end to end."""
    code = next(code for code, name in _DTYPE_CODES.items() if name == dtype.name)
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(lengths), _CHUNK)]
    with open(path, "wb") as file:
        file.write(HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        for part in chunks:
            file.write(np.ascontiguousarray(lengths[part], dtype="<i4"))
        offset = 0
        for part in chunks:
            ends = np.cumsum(lengths[part], dtype=np.int64) * dtype.itemsize + offset
            file.write(np.concatenate(([offset], ends[:-1])).astype("<i8"))
            offset = int(ends[-1])
        for start in range(0, len(lengths) + 1, _CHUNK):
            file.write(np.arange(start, min(start + _CHUNK, len(lengths) + 1), dtype="<i8"))


def read_header(path: Path) -> IndexHeader | None:
    """The header of an .idx file, or None where it is none of version 1."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    magic, version, code, sequences, entries = HEADER.unpack(header)
    return IndexHeader(_DTYPE_CODES.get(code), sequences, entries) if (magic, version) == (_MAGIC, 1) else None


def read_lengths(path: Path) -> np.ndarray:
    """Lengths of the documents (int32), memory-mapped."""
    return _mapped(path, np.dtype("<i4"), HEADER.size)


def index_problems(path: Path, lengths: np.ndarray, itemsize: int) -> Iterable[str]:
    """Checks offsets and document table of an .idx file against its lengths; yields what is wrong."""
    offsets = _mapped(path, np.dtype("<i8"), HEADER.size + 4 * len(lengths))
    table = np.memmap(path, dtype="<i8", mode="r", offset=HEADER.size + 12 * len(lengths), shape=(len(lengths) + 1,))
    expected = 0
    for start in range(0, len(lengths), _CHUNK):
        ends = np.cumsum(lengths[start : start + _CHUNK], dtype=np.int64) * itemsize + expected
        if not np.array_equal(offsets[start : start + _CHUNK], np.concatenate(([expected], ends[:-1]))):
            yield f"the offsets of documents {start} to {start + len(ends) - 1} do not add up"
        if not np.array_equal(table[start : start + len(ends)], np.arange(start, start + len(ends))):
            yield f"the document table is wrong between {start} and {start + len(ends) - 1}"
        expected = int(ends[-1])
    if table[-1] != len(lengths):
        yield "the document table does not end with the number of documents"


def _mapped(path: Path, dtype: np.dtype, offset: int) -> np.ndarray:
    header = read_header(path)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(header.sequences,))
