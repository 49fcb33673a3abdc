"""How fast corpora become datasets on this machine: compressed lines in, .bin and .idx out."""

from __future__ import annotations

import resource
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import zstandard

from megatron_implicit.data.corpus import CorpusReader, find_sources
from megatron_implicit.data.preparation import prepare_shards
from megatron_implicit.data.shards import Recipe
from megatron_implicit.data.tokenizers import HuggingFaceTokenizer, Tokenizer

_SHARDS = 4


@dataclass(frozen=True)
class Timing:
    """One preparation."""

    wall_s: float
    cpu_s: float
    """Of the workers."""


class DataBenchmark:
    """Prepares the same shards with one worker and with two.

    Args:
        tokenizer: to tokenize with.
        corpus: files with natural text; Python's own library is added as code, half and half.
        megabytes: text to prepare in all.
    """

    def __init__(self, tokenizer: Tokenizer, corpus: Sequence[Path], megabytes: float) -> None:
        self._tokenizer, self._corpus = tokenizer, corpus
        self._shard_bytes = int(megabytes * 1e6 / _SHARDS)

    def run(self, repeats: int) -> dict[str, float | int | bool]:
        """Best of ``repeats``, one worker and two in turn. MB are 10^6 bytes of UTF-8 text."""
        with tempfile.TemporaryDirectory() as folder:
            text_bytes = self._write_shards(Path(folder) / "shards")
            timings = {1: [], 2: []}
            for repeat in range(repeats):
                for workers, measured in timings.items():
                    measured.append(self._prepare(Path(folder), f"{workers}-{repeat}", workers))
        one, two = (min(timing.wall_s for timing in timings[workers]) for workers in (1, 2))
        cpu = min(timing.cpu_s for timing in timings[1])
        return {
            "fast_encoder": isinstance(self._tokenizer, HuggingFaceTokenizer) and self._tokenizer.is_fast,
            "text_mb": round(text_bytes / 1e6, 1),
            "one_core_mb_per_s": round(text_bytes / 1e6 / cpu, 2),
            "one_worker_mb_per_s": round(text_bytes / 1e6 / one, 2),
            "two_workers_mb_per_s": round(text_bytes / 1e6 / two, 2),
            "two_workers_speedup": round(one / two, 2),
        }

    def _prepare(self, folder: Path, name: str, workers: int) -> Timing:
        sources = find_sources([str(folder / "shards")])
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.monotonic()
        prepare_shards(sources, Recipe(self._tokenizer), folder / name, workers=workers)
        wall = time.monotonic() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return Timing(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    def _write_shards(self, folder: Path) -> int:
        """Writes .jsonl.zst files; returns the bytes of text in them."""
        folder.mkdir()
        documents, total = self._documents(), 0
        for number in range(_SHARDS):
            with zstandard.open(folder / f"{number}.jsonl.zst", "wb") as file:
                size = 0
                while size < self._shard_bytes:
                    text = next(documents)
                    file.write(orjson.dumps({"text": text}) + b"\n")
                    size += len(text.encode("utf-8"))
            total += size
        return total

    def _documents(self) -> Iterator[str]:
        """Natural text and code in turn, as many bytes of each, without end."""
        prose, code = _repeated(self._corpus), _repeated(_library())
        balance = 0
        while True:
            text = next(prose if balance <= 0 else code)
            balance += len(text) if balance <= 0 else -len(text)
            yield text


def _repeated(sources: Sequence[Path]) -> Iterator[str]:
    texts = [path.read_text("utf-8") for path in sources] if sources[0].suffix == ".py" else [*CorpusReader(sources)]
    while True:
        yield from texts


def _library() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
