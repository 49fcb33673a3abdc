"""Which input file becomes which dataset, which of them are finished, and tokenizing one of them.

A shard is an input file and the dataset made of it alone. Nothing is remembered but the datasets themselves: a shard is
finished where its manifest exists and fits, so a killed run goes on by being started again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_implicit.data.corpus import EMPTY, SUFFIXES, BadRecord, Reading, SourceReader
from megatron_implicit.data.indexed import IndexedDatasetWriter, check_sizes, file_sha256
from megatron_implicit.data.manifest import Manifest, Source, dataset_files, read_manifest
from megatron_implicit.data.tokenizers import Tokenizer
from megatron_implicit.errors import DataError

RESERVED_NAMES = ("tokenizer", "manifest")
"""Names that other files of a dataset folder have."""


@dataclass(frozen=True)
class Shard:
    """An input file and the prefix of the dataset made of it."""

    source: Path
    prefix: Path


@dataclass(frozen=True)
class Recipe:
    """How documents become tokens; two datasets of the same sources and recipe are the same bytes."""

    tokenizer: Tokenizer
    reading: Reading = Reading()


@dataclass
class Counts:
    """Work done."""

    read_bytes: int = 0
    """Of the input files, as they lie on disk."""
    text_bytes: int = 0
    tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.read_bytes + other.read_bytes, self.text_bytes + other.text_bytes, self.tokens + other.tokens
        )

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.read_bytes - other.read_bytes, self.text_bytes - other.text_bytes, self.tokens - other.tokens
        )


def named_shards(sources: Sequence[Path], folder: Path) -> list[Shard]:
    """Shards named after their files: corpus/00.jsonl.zst becomes FOLDER/00.bin and so on.

    Raises:
        DataError: two files of one name, or a name that is not to be used.
    """
    shards: dict[str, Shard] = {}
    for source in sources:
        name = source.name.removesuffix(next(suffix for suffix in SUFFIXES if source.name.endswith(suffix)))
        if name in RESERVED_NAMES or not name:
            raise DataError(f"a dataset cannot be named {name or source.name}: rename {source}")
        if name in shards:
            raise DataError(
                f"{shards[name].source} and {source} would both become {folder / name}; prepare them into different"
                " folders"
            )
        shards[name] = Shard(source, folder / name)
    return list(shards.values())


def numbered_shards(sources: Sequence[Path], folder: Path) -> list[Shard]:
    """Shards named by their place in ``sources``."""
    return [Shard(source, folder / f"{number:05d}") for number, source in enumerate(sources)]


def tokenize_shard(
    shard: Shard,
    recipe: Recipe,
    report: Callable[[Counts], None] = lambda counts: None,
    warn: Callable[[str], None] = lambda message: None,
) -> Manifest:
    """Makes the dataset of one shard. Records that give no document are counted and left out.

    Args:
        report: called after every document with the work so far.
        warn: called with a line of text for each record left out.

    Raises:
        DataError, OSError: the source cannot be read, or the dataset not written; nothing is left of it.
    """
    with IndexedDatasetWriter(shard.prefix, recipe.tokenizer) as writer:

        def skip(record: BadRecord) -> None:
            writer.skipped.add(shard.source, record)
            warn(record.describe(shard.source))

        reader = SourceReader(shard.source, recipe.reading, skip)
        for text in reader:
            ids = recipe.tokenizer.encode(text)
            if ids:
                writer.add_document(ids)
            else:
                skip(BadRecord(reader.line, EMPTY))
            report(Counts(reader.read_bytes, reader.text_bytes, writer.tokens))
        source = Source(shard.source.name, shard.source.stat().st_size, reader.sha256)
        return writer.finish([source], recipe.reading, reader.text_bytes)


def existing(prefix: Path, sources: Iterable[Path], recipe: Recipe) -> Manifest | None:
    """The manifest of the dataset ``prefix`` where it is whole and made of ``sources`` by ``recipe``.

    A source is taken for the same where name and size are, and it is older than the manifest or has the same checksum.
    """
    try:
        manifest = check_sizes(prefix)
    except DataError:
        return None
    written = dataset_files(prefix)[2].stat().st_mtime_ns
    sources = list(sources)
    fits = (
        manifest.tokenizer == recipe.tokenizer.fingerprint
        and manifest.reading == recipe.reading
        and len(manifest.sources) == len(sources)
        and all(_same(path, known, written) for path, known in zip(sources, manifest.sources))
    )
    return manifest if fits else None


def _same(path: Path, known: Source, written: int) -> bool:
    status = path.stat()
    if (path.name, status.st_size) != (known.name, known.bytes):
        return False
    return status.st_mtime_ns < written or file_sha256(path) == known.sha256


def unfinished(shards: Sequence[Shard], recipe: Recipe, *, overwrite: bool) -> list[int]:
    """Numbers of the shards that are still to be made, the largest first: so the last ones to finish are small.

    Raises:
        DataError: a dataset of a shard's name is there but was made otherwise, and ``overwrite`` is not set.
    """
    missing = [number for number, shard in enumerate(shards) if not existing(shard.prefix, [shard.source], recipe)]
    for number in missing:
        manifest_path = dataset_files(shards[number].prefix)[2]
        if manifest_path.exists() and not overwrite:
            raise DataError(
                f"{manifest_path} belongs to a dataset that is damaged, or made from another source, with another"
                " tokenizer or other options; name another output, or add --overwrite"
            )
    return sorted(missing, key=lambda number: -shards[number].source.stat().st_size)


def finished(shards: Sequence[Shard]) -> list[Manifest]:
    """The manifests of all shards, in order; raises DataError where one is missing."""
    return [read_manifest(shard.prefix) for shard in shards]
