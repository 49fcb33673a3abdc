"""From corpus files to indexed datasets, with several processes and on several nodes, restartable at any moment.

``prepare_shards`` makes a dataset of each file. ``prepare_dataset`` makes one dataset of all: their shards are made in
a folder PREFIX.parts, merged, and removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from megatron_implicit.data.manifest import Manifest, PathLike, dataset_files
from megatron_implicit.data.merging import merge_datasets
from megatron_implicit.data.progress import PreparationProgress
from megatron_implicit.data.publishing import remove_leftovers
from megatron_implicit.data.shards import (
    RESERVED_NAMES,
    Counts,
    Recipe,
    Shard,
    existing,
    finished,
    named_shards,
    numbered_shards,
    unfinished,
)
from megatron_implicit.data.summary import write_summary
from megatron_implicit.data.team import Team, join_team
from megatron_implicit.data.workers import Done, Failed, Progress, Warned, Workers
from megatron_implicit.errors import DataError

_WAIT = 0.05
"""Seconds to wait for news of the workers."""


@dataclass(frozen=True)
class Preparation:
    """What a preparation did."""

    manifests: list[Manifest]
    """Of the datasets, made now or before."""
    written: int
    """How many were made now."""


class PreparationFailed(DataError):
    """Some shards could not be made; the others are finished."""


def prepare_shards(
    sources: Sequence[Path], recipe: Recipe, folder: Path, *, workers: int = 1, overwrite: bool = False
) -> Preparation | None:
    """Makes the dataset FOLDER/NAME of every file NAME.jsonl and so on, except of those that are finished.

    In an MPI job all ranks call it; rank 0 gets the result, the others None. Also written: FOLDER/manifest.json, the
    sum of all.

    Raises:
        DataError: a dataset of another recipe or source is in the way and ``overwrite`` is not set.
        PreparationFailed: naming each shard that failed; what is finished stays.
    """
    shards = named_shards(sources, folder)
    written = _make(shards, recipe, workers, overwrite)
    if written is None:
        return None
    remove_leftovers(folder)
    manifests = finished(shards)
    write_summary(folder, shards, manifests)
    return Preparation(manifests, written)


def prepare_dataset(
    sources: Sequence[Path], recipe: Recipe, prefix: PathLike, *, workers: int = 1, overwrite: bool = False
) -> Preparation | None:
    """Makes one dataset ``prefix`` of all ``sources``. Returns and raises what ``prepare_shards`` does.

    Raises:
        DataError: ``prefix`` is in use by something else and ``overwrite`` is not set, or there is no text.
    """
    if os.path.basename(prefix) in ("", *RESERVED_NAMES):
        raise DataError(f"a dataset cannot be named {os.fspath(prefix)}: give a prefix such as data/corpus")
    parts = Path(os.fspath(prefix) + ".parts")
    done = existing(Path(prefix), sources, recipe)
    if done is None and not overwrite:
        _refuse_to_replace(prefix)
    shards = numbered_shards(sources, parts)
    written = _make([] if done else shards, recipe, workers, overwrite=True)
    if written is None:
        return None
    try:
        manifest = done or merge_datasets([shard.prefix for shard in shards], prefix)
    except DataError:
        shutil.rmtree(parts)
        raise
    shutil.rmtree(parts, ignore_errors=True)
    return Preparation([manifest], 0 if done else 1)


def _refuse_to_replace(prefix: PathLike) -> None:
    if dataset_files(prefix)[2].exists():
        raise DataError(
            f"{dataset_files(prefix)[0]} is damaged or made from other sources, with another tokenizer or other"
            " options; name another output, or add --overwrite"
        )


def _make(shards: Sequence[Shard], recipe: Recipe, workers: int, overwrite: bool) -> int | None:
    """Makes the shards that are not finished. Returns how many, on rank 0, and None on the other ranks.

    The workers are forked before MPI is loaded, which does not survive it.
    """
    recipe.tokenizer.encode("")  # what a tokenizer does at its first text is done once, before the fork
    with Workers(min(workers, len(shards)), shards, recipe) as pool, join_team() as team:
        todo = team.agree(lambda: unfinished(shards, recipe, overwrite=overwrite))
        team.open(todo)
        total = sum(shards[number].source.stat().st_size for number in todo)
        with PreparationProgress(len(todo), total, shown=team.rank == 0) if todo else nullcontext() as progress:
            failures = _run(pool, team, progress) if todo else []
            results = team.gather(failures)
        failed = [message for failures in results for message in failures]
        if failed:
            raise PreparationFailed("; ".join(failed))
        return len(todo) if team.rank == 0 else None


def _run(pool: Workers, team: Team, progress: PreparationProgress) -> list[str]:
    """Keeps the workers busy until no shard is left, or one failed for good. Returns what failed."""
    failures: list[str] = []
    left = True
    while left or pool.busy:
        while left and pool.idle:
            shard = team.take()
            left = shard is not None
            if left:
                pool.start(shard)
        news = Counts()
        for message in pool.messages(_WAIT):
            match message:
                case Progress(counts):
                    news += counts
                case Warned(words):
                    progress.say(f"skipped {words}")
                case Failed(_, words, fatal):
                    failures.append(words)
                    if fatal:
                        return failures
                case Done():
                    pass
        progress.show(team.exchange(news))
    return failures
