"""Keeps the code with a run: weeks of requeues must not meet what a `git pull` has changed meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

FOLDERS = ("launch", "megatron_implicit", "tools", "SLURM")


def keep_code(repository: Path, target: Path, *, update: bool) -> None:
    """Copies the code to ``target`` unless it is there already; its VERSION says what it is.

    Args:
        repository: where the code is.
        target: a folder of the run.
        update: replace what is there; the old one stays beside it as NAME.1, NAME.2 and so on.
    """
    if target.exists() and not update:
        return
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for folder in FOLDERS:
        shutil.copytree(
            repository / folder, partial / folder, ignore=shutil.ignore_patterns("__pycache__", "corpus", "cluster.env")
        )
    (partial / "VERSION").write_text(_version(repository) + "\n", encoding="utf-8")
    if target.exists():
        number = 1 + sum(1 for _ in target.parent.glob(f"{target.name}.[0-9]*"))
        os.rename(target, target.with_name(f"{target.name}.{number}"))
    os.rename(partial, target)


def _version(repository: Path) -> str:
    """The commit, with '-dirty' where files differ from it."""
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
