"""Documents from corpus files: .jsonl, .jsonl.zst, .jsonl.gz (one object {"text": ...} a line), .txt (one document)."""

from __future__ import annotations

import glob
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import zstandard

from megatron_implicit.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".txt")

_BLOCK = 1 << 18
"""Bytes read from a file at once."""
_LARGEST_WINDOW = 1 << 31
"""Largest zstd window, in bytes, that is accepted: files written with ``zstd --long=31`` need it."""


def find_sources(inputs: Sequence[str]) -> list[Path]:
    """Corpus files named by ``inputs`` (files, globs, or folders searched for the known suffixes), each once, in order.

    Raises:
        DataError: an input matches no file, or names one of another kind.
    """
    sources: dict[Path, None] = {}
    for name in inputs:
        sources.update(dict.fromkeys(_matches(name)))
    return list(sources)


def _matches(name: str) -> list[Path]:
    if Path(name).is_dir():
        found = sorted(path for path in Path(name).rglob("*") if path.is_file() and path.name.endswith(SUFFIXES))
        if not found:
            raise DataError(f"folder {name} holds no {', '.join(SUFFIXES)} file; name one that does")
        return found
    found = [Path(name)] if Path(name).exists() else sorted(map(Path, glob.glob(name, recursive=True)))
    if not found:
        raise DataError(f"no input file {name}; check the path")
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path} is none of {', '.join(SUFFIXES)}; convert it or leave it out")
    return found


class CorpusReader:
    """The documents of corpus files, in order; counts what has been read on the way."""

    def __init__(self, sources: Iterable[Path]) -> None:
        self.sources = list(sources)
        self.total_bytes = sum(os.path.getsize(path) for path in self.sources)
        """Bytes of all files as they lie on disk."""
        self.read_bytes = 0
        """Of those, bytes read so far."""
        self.text_bytes = 0
        """UTF-8 bytes of the documents given out so far."""

    def __iter__(self) -> Iterator[str]:
        """Yields each document's text, empty ones too.

        Raises:
            DataError: naming the file, and the line where there is one.
        """
        for path in self.sources:
            yield from self._documents(path)

    def _documents(self, path: Path) -> Iterator[str]:
        number = 0
        with open(path, "rb") as file:
            try:
                if path.name.endswith(".txt"):
                    yield self._counted(b"".join(self._blocks(file)).decode("utf-8"))
                    return
                for number, line in enumerate(_lines(_decompressed(path, self._blocks(file))), start=1):
                    if line.strip():
                        yield self._counted(_text_of(line))
            except (zstandard.ZstdError, EOFError, zlib.error) as error:
                raise DataError(
                    f"{path} is truncated or damaged after line {number} ({error}); fetch or compress it again"
                ) from error
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it") from error
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}; correct or remove the line") from error

    def _counted(self, text: str) -> str:
        self.text_bytes += len(text.encode("utf-8"))
        return text

    def _blocks(self, file: BinaryIO) -> Iterator[bytes]:
        while block := file.read(_BLOCK):
            self.read_bytes += len(block)
            yield block


def _decompressed(path: Path, blocks: Iterator[bytes]) -> Iterator[bytes]:
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


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of the joined blocks, without line ends."""
    begun: list[bytes] = []
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for part in ended:
            yield b"".join((*begun, part))
            begun = []
        begun.append(rest)
    yield b"".join(begun)


def _text_of(line: bytes) -> str:
    """The text of a JSON line; raises ValueError saying what is wrong with it."""
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise ValueError('not an object with a string under "text"')
    return text
