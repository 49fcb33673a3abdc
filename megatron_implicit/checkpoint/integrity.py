"""Proof that a checkpoint is whole: a manifest of the sizes and checksums of its files."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Optional, TypedDict

import torch.distributed as dist

from megatron_implicit.checkpoint.layout import MANIFEST_FILE, sync_folder, write_durably
from megatron_implicit.comm.agreement import first_problem
from megatron_implicit.errors import CheckpointError

_BLOCK = 1 << 22


class FileEntry(TypedDict):
    """What the manifest knows of a file."""

    bytes: int
    crc32: int


def write_manifest(folder: Path, entries: dict[str, FileEntry]) -> None:
    """Writes the list of a folder's files; for one rank.

    Args:
        folder: of a checkpoint.
        entries: what is known of its files, by their path in the folder; the others are synced and summed here.
    """
    others = {name: measure_file(folder / name) for name in _files(folder) if name not in entries}
    write_durably(folder / MANIFEST_FILE, json.dumps({"files": {**entries, **others}}, indent=1, sort_keys=True))
    sync_folder(folder)


def find_problem(folder: Path) -> Optional[str]:
    """What is wrong with a checkpoint, naming the file; None if it is whole. Ranks of a job share the work, and all
    must call it; they get the same answer."""
    entries, problem = _read_manifest(folder)
    grouped = dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    share = sorted(entries)[rank::world]
    problem = problem or next((text for name in share if (text := _problem(folder / name, entries[name]))), None)
    if grouped:
        problem = first_problem(problem)
    return problem


def find_obvious_problem(folder: Path) -> Optional[str]:
    """As ``find_problem``, without reading the files: none missing, all of their size. For a single process."""
    entries, problem = _read_manifest(folder)
    return problem or next((text for name in entries if (text := _misfit(folder / name, entries[name]))), None)


def verify_manifest(folder: Path) -> None:
    """Checks every file's size and checksum; ranks of a job share the work and all raise together.

    Raises:
        CheckpointError: a file is missing, truncated or altered; names the first one.
    """
    problem = find_problem(folder)
    if problem:
        raise CheckpointError(f"{problem}: the checkpoint is damaged; give an earlier step_... folder")


def measure_file(path: Path) -> FileEntry:
    """Size and checksum of a file; it is on disk when this returns."""
    return _measure(path, sync=True)


def identify(folder: Path) -> str:
    """A short name of what a model's folder holds, wherever it lies: of its manifest, or else of all of its files."""
    manifest = folder / MANIFEST_FILE
    if manifest.is_file():
        contents = manifest.read_bytes()
    else:
        contents = json.dumps({name: _measure(folder / name) for name in _files(folder)}, sort_keys=True).encode()
    return hashlib.sha256(contents).hexdigest()[:12]


def _read_manifest(folder: Path) -> tuple[dict[str, FileEntry], Optional[str]]:
    try:
        return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"], None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return {}, f"{folder} has no readable {MANIFEST_FILE}"


def _misfit(path: Path, expected: FileEntry) -> Optional[str]:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    return f"{path} has {size} bytes instead of {expected['bytes']}" if size != expected["bytes"] else None


def _problem(path: Path, expected: FileEntry) -> Optional[str]:
    misfit = _misfit(path, expected)
    if misfit is None and _measure(path)["crc32"] != expected["crc32"]:
        return f"{path} does not match its checksum"
    return misfit


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
