"""Documents from corpus files.

.jsonl, .jsonl.zst and .jsonl.gz hold one object with the text under a key a line, a .parquet file has a column of that
name, and a .txt file is one document.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from megatron_implicit.data.formats import DAMAGE, Overlong, decompressed, lines, parquet_column
from megatron_implicit.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".txt")

NO_TEXT, EMPTY = "no text", "empty text"
"""Reasons of records whose text is missing, and of documents without any."""

_Record = bytes | Overlong | None
_BLOCK = 1 << 18
"""Bytes read from a file at once."""


@dataclass(frozen=True)
class Reading:
    """How documents are read; another choice may give other documents."""

    text_key: str = "text"
    """Key of a .jsonl object, or column of a .parquet file, that holds the text."""
    max_line_bytes: int = 100_000_000
    """A longer line (or row, or .txt file) is skipped: tokenizing it would need gigabytes of memory."""


@dataclass(frozen=True)
class BadRecord:
    """A line, row or file that gives no document."""

    line: int
    """Line of a .jsonl file or row of a .parquet file, counted from 1; 0 where it is the file as a whole."""
    reason: str
    """One of few: what to count it under."""
    detail: str = ""

    def describe(self, path: Path) -> str:
        """file:line: reason (detail)."""
        place = f"{path}:{self.line}" if self.line else str(path)
        return f"{place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class _Unusable(ValueError):
    """The record at hand gives no document, for (reason, detail)."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


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


class SourceReader:
    """The documents of one corpus file, in order; counts what has been read on the way.

    Args:
        path: the file.
        reading: how.
        on_bad: called with each record that gives no document, which is then left out; without it such a record is a
            DataError that names file and line.
    """

    def __init__(
        self, path: Path, reading: Reading = Reading(), on_bad: Callable[[BadRecord], None] | None = None
    ) -> None:
        self.path = path
        self.line = 0
        """Line (or row) of the document given out last."""
        self.read_bytes = 0
        """Bytes of the file read so far."""
        self.text_bytes = 0
        """UTF-8 bytes of the documents given out so far."""
        self._reading = reading
        self._on_bad = on_bad
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """sha256 (hex) of the whole file; to be asked after its last document."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[str]:
        """Yields each document's text, empty ones too.

        Raises:
            DataError: a record that gives no document, where ``on_bad`` is not given; OSError where reading fails.
        """
        with open(self.path, "rb") as file:
            records = self._records(file)
            while True:
                try:
                    text = self._text_of(next(records))
                except StopIteration:
                    break
                except _Unusable as error:
                    self._refuse(BadRecord(self.line, error.reason, error.detail))
                    continue
                self.text_bytes += len(text) if text.isascii() else len(text.encode("utf-8"))
                yield text
            for _ in self._blocks(file):  # what damage left unread still counts for the checksum
                pass

    def _records(self, file: BinaryIO) -> Iterator[_Record]:
        """Raw records, numbered in ``line``, without blank lines. Raises _Unusable where the file is damaged."""
        try:
            if self.path.name.endswith(".txt"):
                yield b"".join(self._blocks(file))
            elif self.path.name.endswith(".parquet"):
                yield from self._rows(file)
            else:
                yield from self._lines(file)
        except DAMAGE as error:
            raise _Unusable("truncated or damaged", f"after line {self.line}: {error}") from error

    def _lines(self, file: BinaryIO) -> Iterator[_Record]:
        blocks = decompressed(self.path, self._blocks(file))
        for number, line in enumerate(lines(blocks, self._reading.max_line_bytes), start=1):
            if isinstance(line, Overlong) or line.strip():
                self.line = number
                yield line

    def _rows(self, file: BinaryIO) -> Iterator[_Record]:
        for _ in self._blocks(file):  # for the checksum
            pass
        try:
            for value in parquet_column(self.path, self._reading.text_key):
                self.line += 1
                yield value
        except KeyError as error:
            raise _Unusable(NO_TEXT, f"there is no text column {error}") from error

    def _text_of(self, record: _Record) -> str:
        limit = self._reading.max_line_bytes
        length = record.bytes if isinstance(record, Overlong) else len(record or b"")
        if length > limit:
            raise _Unusable("line too long", f"{length:,} bytes, the limit is {limit:,}")
        if record is None:
            raise _Unusable(NO_TEXT, "the value is null")
        if self.path.name.endswith((".txt", ".parquet")):
            return _decoded(record)
        return _json_text(record, self._reading.text_key)

    def _refuse(self, record: BadRecord) -> None:
        if self._on_bad is None:
            raise DataError(f"{record.describe(self.path)}; correct or remove it")
        self._on_bad(record)

    def _blocks(self, file: BinaryIO) -> Iterator[bytes]:
        while block := file.read(_BLOCK):
            self.read_bytes += len(block)
            self._hash.update(block)
            yield block


class CorpusReader:
    """The documents of several corpus files, in order; a record that gives none is a DataError."""

    def __init__(self, sources: Iterable[Path], reading: Reading = Reading()) -> None:
        self.sources = list(sources)
        self.text_bytes = 0
        """UTF-8 bytes of the documents of the files read to their end so far."""
        self._reading = reading

    def __iter__(self) -> Iterator[str]:
        """Yields each document's text, empty ones too; raises DataError naming file and line."""
        for path in self.sources:
            reader = SourceReader(path, self._reading)
            yield from reader
            self.text_bytes += reader.text_bytes


def _json_text(line: bytes, key: str) -> str:
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        _decoded(line)
        raise _Unusable("not valid JSON", str(error)) from error
    text = document.get(key) if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise _Unusable(NO_TEXT, f'not an object with a string under "{key}"')
    return text


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Unusable("not UTF-8", f"byte {error.start}") from error
