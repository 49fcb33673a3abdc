"""Folders of a run's checkpoints: ``checkpoints/step_00000100/`` and the text file ``checkpoints/latest``.

A step's folder is written as ``step_00000100.partial`` and renamed when everything in it is on disk; ``latest`` moves
after that. Whatever is interrupted, the newest whole checkpoint stays named.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from megatron_implicit.config import Config, config_from_dict
from megatron_implicit.errors import CheckpointError, ConfigError

_STEP = re.compile(r"^step_(\d{8,})$")
CONFIG_FILE, STATE_FILE, MANIFEST_FILE = "config.yaml", "state.json", "manifest.json"


class CheckpointFolder:
    """The ``checkpoints/`` folder of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def step_folder(self, step: int) -> Path:
        """Folder of one step's checkpoint."""
        return self.path / f"step_{step:08d}"

    def partial_folder(self, step: int) -> Path:
        """Where that checkpoint is written before it is whole."""
        return self.path / f"step_{step:08d}.partial"

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        if not self.path.is_dir():
            return []
        return sorted(int(match[1]) for entry in self.path.iterdir() if (match := _STEP.match(entry.name)))

    def latest(self) -> Path | None:
        """The checkpoint that ``latest`` names; None if there is none yet.

        Raises:
            CheckpointError: ``latest`` names a folder that is not there, or is missing although there are checkpoints.
        """
        pointer = self.path / "latest"
        if not pointer.is_file():
            if self.steps():
                raise CheckpointError(
                    f"{self.path} holds checkpoints but no 'latest': write the name of a step_... folder to {pointer}"
                )
            return None
        folder = self.path / pointer.read_text(encoding="utf-8").strip()
        if not folder.is_dir():
            raise CheckpointError(
                f"{pointer} names {folder.name}, which is not there: write the name of a folder that is"
            )
        return folder

    def publish(self, step: int) -> Path:
        """Renames the partial folder of a step and moves ``latest`` to it; everything in it must be on disk."""
        final = self.step_folder(step)
        if final.exists():
            shutil.rmtree(final)
        os.replace(self.partial_folder(step), final)
        sync_folder(self.path)
        temporary = self.path / "latest.partial"
        write_durably(temporary, final.name + "\n")
        os.replace(temporary, self.path / "latest")
        sync_folder(self.path)
        return final

    def prune(self, keep_last: int, keep_every: int) -> None:
        """Removes all but the newest ``keep_last`` checkpoints and those at multiples of ``keep_every`` steps.

        Checkpoints newer than ``latest`` are left alone: after a roll-back they are not this run's.
        """
        latest = self.latest()
        older = [step for step in self.steps() if latest is not None and self.step_folder(step) <= latest]
        for step in older[:-keep_last]:
            if not (keep_every and step % keep_every == 0):
                shutil.rmtree(self.step_folder(step))


def locate_checkpoint(path: Path) -> Path:
    """One step's folder, from that folder, a ``checkpoints/`` folder or a run's folder.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    for candidate in (path, path / "checkpoints"):
        latest = CheckpointFolder(candidate).latest()
        if latest is not None:
            return latest
    raise CheckpointError(f"{path} holds no checkpoint: give a run's folder, its checkpoints/ or one step_... folder")


def read_checkpoint_config(step_folder: Path) -> Config:
    """The resolved configuration a checkpoint was saved with.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    try:
        return config_from_dict(yaml.safe_load((step_folder / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ConfigError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{step_folder / CONFIG_FILE} cannot be read ({reason}): take another checkpoint"
        ) from None


def read_state(step_folder: Path) -> dict[str, Any]:
    """The run's counters and callbacks' states, as saved.

    Raises:
        CheckpointError: missing or unreadable.
    """
    try:
        return json.loads((step_folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{step_folder / STATE_FILE} cannot be read ({error}): take another checkpoint") from None


def write_durably(path: Path, text: str) -> None:
    """Writes a text file and waits until it is on disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
