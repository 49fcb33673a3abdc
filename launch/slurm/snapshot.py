"""Keeps the code with a run: weeks of requeues must not meet what a `git pull` has changed meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

FOLDERS = ("launch", "megatron_implicit", "tools", "SLURM")


def keep_code(repository: Path, target: Path, *, update: bool) -> bool:
    """Copies the code to ``target`` unless it is there already; its VERSION says what it is.

    Args:
        repository: where the code is.
        target: a folder of the run.
        update: replace what is there; the old one stays beside it as NAME.1, NAME.2 and so on.

    Returns:
        whether it copied: ``take_back`` undoes that.
    """
    if target.exists() and not update:
        return False
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for folder in FOLDERS:
        shutil.copytree(
            repository / folder, partial / folder, ignore=shutil.ignore_patterns("__pycache__", "corpus", "cluster.env")
        )
    (partial / "VERSION").write_text(_version(repository) + "\n", encoding="utf-8")
    if target.exists():
        os.rename(target, _replaced(target, _replacements(target) + 1))
    os.rename(partial, target)
    return True


def take_back(target: Path) -> None:
    """Removes the code that no job will run: the one before takes its place again, if there is one."""
    shutil.rmtree(target)
    number = _replacements(target)
    if number:
        os.rename(_replaced(target, number), target)


def _replacements(target: Path) -> int:
    return sum(1 for _ in target.parent.glob(f"{target.name}.[0-9]*"))


def _replaced(target: Path, number: int) -> Path:
    return target.with_name(f"{target.name}.{number}")


def _version(repository: Path) -> str:
    """The commit, with '-dirty' where files differ from it."""
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
