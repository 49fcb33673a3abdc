"""Proof that a checkpoint is whole: a manifest of sizes and checksums, made by all ranks together."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import TypedDict

import torch.distributed as dist

from megatron_implicit.checkpoint.layout import MANIFEST_FILE, sync_folder, write_durably
from megatron_implicit.errors import CheckpointError

_BLOCK = 1 << 22


class FileEntry(TypedDict):
    """What the manifest knows of a file."""

    bytes: int
    crc32: int


def write_manifest(folder: Path) -> None:
    """Every rank syncs and sums its share of the files, rank 0 writes the list; all ranks must call it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    listing = [_files(folder) if rank == 0 else None]
    dist.broadcast_object_list(listing, src=0)  # one list, whatever each rank's view of a shared file system
    files = listing[0]
    mine = {name: _measure(folder / name, sync=True) for name in files[rank::world]}
    shares: list[dict[str, FileEntry] | None] = [None] * world
    dist.all_gather_object(shares, mine)
    if rank == 0:
        entries = {name: entry for share in shares for name, entry in share.items()}
        write_durably(folder / MANIFEST_FILE, json.dumps({"files": entries}, indent=1, sort_keys=True))
        sync_folder(folder)
    dist.barrier()


def verify_manifest(folder: Path) -> None:
    """Checks every file's size and checksum; ranks of a job share the work and all raise together.

    Raises:
        CheckpointError: a file is missing, truncated or altered; names the first one.
    """
    try:
        entries: dict[str, FileEntry] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, json.JSONDecodeError, KeyError):
        raise CheckpointError(
            f"{folder} has no readable {MANIFEST_FILE}: it is not a whole checkpoint; take another"
        ) from None
    grouped = dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    problem = next(
        (text for name in sorted(entries)[rank::world] if (text := _problem(folder / name, entries[name]))), None
    )
    if grouped:
        problems: list[str | None] = [None] * world
        dist.all_gather_object(problems, problem)
        problem = next((text for text in problems if text), None)
    if problem:
        raise CheckpointError(
            f"{problem}: the checkpoint is damaged; write the name of an earlier step_... folder to "
            f"{folder.parent / 'latest'}"
        )


def _problem(path: Path, expected: FileEntry) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path} has {size} bytes instead of {expected['bytes']}"
    if _measure(path)["crc32"] != expected["crc32"]:
        return f"{path} does not match its checksum"
    return None


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)


def _measure(path: Path, *, sync: bool = False) -> FileEntry:
    checksum, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
        if sync:
            os.fsync(file.fileno())
    return {"bytes": size, "crc32": checksum}
