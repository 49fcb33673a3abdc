"""From corpus files to an indexed dataset: a finished one of the same sources and tokenizer is left as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_implicit.data.corpus import CorpusReader
from megatron_implicit.data.indexed import (
    IndexedDatasetWriter,
    Manifest,
    PathLike,
    Source,
    check_indexed,
    dataset_files,
    file_sha256,
)
from megatron_implicit.data.tokenizers import Tokenizer
from megatron_implicit.errors import DataError


@dataclass(frozen=True)
class Preparation:
    """What ``prepare_dataset`` did."""

    manifest: Manifest
    written: bool
    """False where the dataset existed and was up to date."""
    text_bytes: int
    """UTF-8 bytes of text that were tokenized."""


Report = Callable[[CorpusReader, int], None]
"""Called after every document with the reader and the number of tokens so far."""


def prepare_dataset(
    sources: Sequence[Path],
    tokenizer: Tokenizer,
    prefix: PathLike,
    *,
    overwrite: bool = False,
    report: Report = lambda reader, tokens: None,
) -> Preparation:
    """Tokenizes the documents of ``sources`` into the dataset ``prefix``; an interrupted run leaves nothing behind.

    Raises:
        DataError: bad input, no text, or ``prefix`` is in use by something else and ``overwrite`` is not set.
    """
    if os.path.basename(prefix) in ("", "tokenizer"):
        raise DataError(f"a dataset cannot be named {os.fspath(prefix)}: give a prefix such as data/corpus")
    described = [Source(path.name, path.stat().st_size, file_sha256(path)) for path in sources]
    existing = _up_to_date(prefix, described, tokenizer)
    if existing is not None:
        return Preparation(existing, written=False, text_bytes=0)
    used = [str(path) for path in dataset_files(prefix) if path.exists()]
    if used and not overwrite:
        raise DataError(
            f"{used[0]} exists and is damaged or made from other sources or another tokenizer; name another"
            " output, or add --overwrite"
        )
    reader = CorpusReader(sources)
    with IndexedDatasetWriter(prefix, tokenizer) as writer:
        for text in reader:
            writer.add_document(tokenizer.encode(text))
            report(reader, writer.tokens)
        manifest = writer.finish(described)
    return Preparation(manifest, written=True, text_bytes=reader.text_bytes)


def _up_to_date(prefix: PathLike, sources: list[Source], tokenizer: Tokenizer) -> Manifest | None:
    """The manifest of a sound dataset that was made from these sources with this tokenizer."""
    try:
        manifest = check_indexed(prefix, tokenizer)
    except DataError:
        return None
    return manifest if manifest.sources == sources else None
