"""Raw records of corpus files: lines of (compressed) .jsonl files and rows of .parquet files, as bytes.

Nothing here knows what a document is. What cannot be read is an exception that says where reading stopped.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from megatron_implicit.errors import DataError

DAMAGE = (zstandard.ZstdError, EOFError, zlib.error)
"""What reading a truncated or damaged compressed file raises."""

_LARGEST_WINDOW = 1 << 31
"""Largest zstd window, in bytes, that is accepted: files written with ``zstd --long=31`` need it."""
_ROWS = 256
"""Rows of a .parquet file read at once."""


@dataclass(frozen=True)
class Overlong:
    """Stands for a line that was longer than the limit and was not kept."""

    bytes: int


def decompressed(path: Path, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The content of a file by its suffix, block by block; raises one of ``DAMAGE`` where it is damaged."""
    if path.name.endswith(".zst"):
        return _joined_frames(blocks, zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj)
    if path.name.endswith(".gz"):
        return _joined_frames(blocks, lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS))
    return blocks


def _joined_frames(blocks: Iterator[bytes], new_decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """Decompresses frames that follow each other; raises EOFError where the last one does not end."""
    decompressor = None
    for block in blocks:
        while block:
            decompressor = decompressor or new_decompressor()
            yield decompressor.decompress(block)
            block = decompressor.unused_data if decompressor.eof else b""
            decompressor = None if decompressor.eof else decompressor
    if decompressor is not None:
        raise EOFError("the compressed data stops before its end")


def lines(blocks: Iterable[bytes], limit: int) -> Iterator[bytes | Overlong]:
    """Lines of the joined blocks, without line ends; of one longer than ``limit`` bytes only the length is kept.

    Where the blocks end with an exception, the unfinished line is dropped and the exception goes on.
    """
    begun: list[bytes] = []
    length = 0
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for part in ended:
            length += len(part)
            yield b"".join((*begun, part)) if length <= limit else Overlong(length)
            begun, length = [], 0
        length += len(rest)
        begun.append(rest)
        if length > limit:
            begun.clear()
    yield b"".join(begun) if length <= limit else Overlong(length)


def parquet_column(path: Path, column: str) -> Iterator[bytes | None]:
    """The values of a text column, undecoded, in the order of the rows; None for a null.

    Raises:
        DataError: pyarrow is not installed.
        EOFError: the file is damaged.
        KeyError: it has no such column, or one of numbers.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet files needs pyarrow; pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            types = {field.name: field.type for field in file.schema_arrow}
            if column not in types or not _is_text(pyarrow, types[column]):
                raise KeyError(column)
            for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
                yield from batch.column(0).cast(pyarrow.large_binary()).to_pylist()
    except pyarrow.ArrowException as error:
        raise EOFError(str(error).splitlines()[0]) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise EOFError(str(error).splitlines()[0]) from error


def _is_text(pyarrow: Any, kind: Any) -> bool:
    types = pyarrow.types
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary))
