from __future__ import annotations

import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from megatron_implicit.data.corpus import CorpusReader, SourceReader, find_sources
from megatron_implicit.data.formats import Overlong, lines
from megatron_implicit.errors import DataError

TEXTS = ["first\nwith two lines", "", "third \u6f22 \x00", "x" * 700_000, "last"]
LINES = b"".join(json.dumps({"text": text, "id": i}).encode() + b"\n" for i, text in enumerate(TEXTS))


def read(path: Path) -> list[str]:
    return list(CorpusReader([path]))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("content", [LINES, LINES[:-1], LINES.replace(b"\n", b"\r\n")])
def test_every_format_gives_the_same_documents(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    compress = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}[suffix]
    path.write_bytes(compress(content))
    reader = SourceReader(path)
    assert list(reader) == TEXTS
    assert reader.read_bytes == path.stat().st_size
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert reader.text_bytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_joined_and_truncated_compressed_files(compress, tmp_path: Path) -> None:
    path = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.zst")
    path.write_bytes(compress(LINES) + compress(LINES))
    assert read(path) == TEXTS * 2
    for cut in (-1, -20):
        path.write_bytes(compress(LINES)[:cut])
        with pytest.raises(DataError, match="a.jsonl.*: truncated or damaged"):
            read(path)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("two\n\nparagraphs\n")
    assert read(path) == ["two\n\nparagraphs\n"]
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8"):
        read(path)


@pytest.mark.parametrize(
    "line",
    [b'{"text": "cut', b'{"txt": "a"}', b'{"text": 3}', b'["text"]', b'{"text": "\\ud800"}', b'{"text": "\xe9"}'],
)
def test_a_bad_line_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError, match=f"{path}:3: "):
        read(path)


def test_sources_are_files_globs_and_folders_each_once(tmp_path: Path) -> None:
    names = ["a.jsonl", "b.txt", "sub/c.jsonl.zst", "notes.md"]
    (tmp_path / "sub").mkdir()
    for name in names:
        (tmp_path / name).touch()
    found = find_sources([str(tmp_path / "*.txt"), str(tmp_path), str(tmp_path / "a.jsonl")])
    assert found == [tmp_path / name for name in ("b.txt", "a.jsonl", "sub/c.jsonl.zst")]
    for bad in ("missing.jsonl", "*.jsonl.gz", "notes.md"):
        with pytest.raises(DataError, match=bad.replace("*", r"\*")):
            find_sources([str(tmp_path / bad)])


@pytest.mark.parametrize("limit", [20, 29, 30, 700_000])
def test_overlong_lines_are_named_and_not_kept(limit: int, tmp_path: Path) -> None:
    lengths = [10, 29, 30, 600_000, 3, 900_000]
    blocks = iter([b"\n".join(b"x" * length for length in lengths)[i : i + 7_001] for i in range(0, 1_600_000, 7_001)])
    found = list(lines(blocks, limit))
    assert [each.bytes if isinstance(each, Overlong) else len(each) for each in found] == lengths
    assert [isinstance(each, Overlong) for each in found] == [length > limit for length in lengths]


def test_an_overlong_line_is_not_held_in_memory() -> None:
    blocks = (bytes(100_000) for _ in range(1000))
    tracemalloc.start()
    assert list(lines(blocks, 1_000_000)) == [Overlong(100_000_000)]
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
