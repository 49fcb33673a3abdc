"""Folders of a run's checkpoints: ``checkpoints/step_00000100/`` and the text file ``checkpoints/latest``.

A step's folder is written as ``step_00000100.attempt0.partial`` and renamed when everything in it is on disk; ``latest``
moves after that. Whatever is interrupted, the newest whole checkpoint stays named. One that turns out damaged is renamed
to ``step_00000100.damaged``; one beside which there is a file ``step_00000100.keep`` is not pruned.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any, Callable

from megatron_implicit.config import Config, config_from_dict, read_config_file
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

    def partial_folder(self, step: int, attempt: int = 0) -> Path:
        """Where an attempt writes that checkpoint before it is whole; no two attempts write to the same."""
        return self.path / f"step_{step:08d}.attempt{attempt}.partial"

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        if not self.path.is_dir():
            return []
        return sorted(int(match[1]) for entry in self.path.iterdir() if (match := _STEP.match(entry.name)))

    def latest(self) -> Path | None:
        """The checkpoint that ``latest`` names, there or not; None if there is none yet.

        Raises:
            CheckpointError: ``latest`` is missing although there are checkpoints.
        """
        pointer = self.path / "latest"
        if not pointer.is_file():
            if self.steps():
                raise CheckpointError(
                    f"{self.path} holds checkpoints but no 'latest': write the name of a step_... folder to {pointer}"
                )
            return None
        return self.path / pointer.read_text(encoding="utf-8").strip()

    def candidates(self) -> list[Path]:
        """Checkpoints a run may go on from, in order: what ``latest`` names, then the ones before it."""
        latest = self.latest()
        if latest is None:
            return []
        return [latest, *(self.step_folder(step) for step in reversed(self.steps()) if self.step_folder(step) < latest)]

    def publish(self, partial: Path, step: int, fence: Callable[[str], None] = lambda purpose: None) -> Path:
        """Renames a partial folder and moves ``latest`` to it; everything in it must be on disk.

        Args:
            partial: what ``partial_folder`` gave.
            step: of the checkpoint.
            fence: called with what is about to be done, before it is; raises where this job may not.
        """
        final = self.step_folder(step)
        fence(f"the checkpoint {final.name}")
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        sync_folder(self.path)
        fence("moving 'latest'")
        self.point_to(final)
        return final

    def point_to(self, folder: Path) -> None:
        """Makes ``latest`` name a checkpoint."""
        temporary = self.path / "latest.partial"
        write_durably(temporary, folder.name + "\n")
        os.replace(temporary, self.path / "latest")
        sync_folder(self.path)

    def set_aside(self, damaged: Path) -> None:
        """Renames a damaged checkpoint, so that it is neither taken nor counted again."""
        if damaged.is_dir():
            aside = damaged.with_name(f"{damaged.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(damaged, aside)

    @staticmethod
    def keep(checkpoint: Path) -> None:
        """Keeps a checkpoint from being pruned, also by a job that trains meanwhile, as long as the file beside it is there.

        Raises:
            CheckpointError: it is not there any more.
            OSError: the folder cannot be written.
        """
        file = _keep_file(checkpoint)
        file.touch()
        if not checkpoint.is_dir():
            file.unlink()
            raise CheckpointError(f"{checkpoint} is not there any more: take another checkpoint")

    def remove_leftovers(self) -> None:
        """Removes what earlier attempts did not finish."""
        for path in self.path.glob("step_*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    def prune(self, keep_last: int, keep_every: int, is_ephemeral: Callable[[int], bool] = lambda step: False) -> None:
        """Removes all but the newest ``keep_last`` checkpoints and those at multiples of ``keep_every`` steps.

        An ephemeral checkpoint stays only while it is the newest, and does not count. Checkpoints that ``keep`` was
        called for stay, and those newer than ``latest``: after a roll-back they are not this run's. What is removed is gone
        from the list at once, and from the disk in the background; what is left of it when the process dies is a leftover.
        """
        latest = self.latest()
        steps = [step for step in self.steps() if latest is not None and self.step_folder(step) <= latest]
        lasting = [step for step in steps if not is_ephemeral(step)]
        kept = {*steps[-1:], *lasting[-keep_last:], *(step for step in lasting if keep_every and step % keep_every == 0)}
        for step in steps:
            if step not in kept and not _keep_file(self.step_folder(step)).exists():
                pruned = self.path / f"{self.step_folder(step).name}.pruned.partial"
                os.replace(self.step_folder(step), pruned)
                threading.Thread(target=shutil.rmtree, args=(pruned, True), name=f"removes {pruned.name}").start()


def _keep_file(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.keep")


def locate_checkpoint(path: Path) -> Path:
    """One step's folder, from that folder, a ``checkpoints/`` folder or a run's folder.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    for candidate in (path, path / "checkpoints"):
        latest = CheckpointFolder(candidate).latest()
        if latest is not None and not latest.is_dir():
            raise CheckpointError(
                f"{candidate / 'latest'} names {latest.name}, which is not there: write the name of a folder that is"
            )
        if latest is not None:
            return latest
    raise CheckpointError(f"{path} holds no checkpoint: give a run's folder, its checkpoints/ or one step_... folder")


def read_checkpoint_config(step_folder: Path) -> Config:
    """The resolved configuration a checkpoint was saved with.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    path, remedy = step_folder / CONFIG_FILE, "take another checkpoint"
    try:
        values = read_config_file(path, remedy)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    try:
        return config_from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path} cannot be read ({str(error).splitlines()[0]}): {remedy}") from None


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
