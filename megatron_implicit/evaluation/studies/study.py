"""What a study is given and what it gives: numbers, tables and figures, kept in a folder of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional, Sequence, TypeVar

T = TypeVar("T")

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Figure:
    """An image in the study's folder."""

    file: str
    """Name of the PNG, relative to the study's folder."""
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of text, as they are shown."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class StudyResult:
    """What a study found."""

    finding: str
    """What the numbers say about the claim, in a sentence or two, with numbers: confirmed, refuted, or not decided."""
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    """Everything that was measured, for other programs."""


@dataclass
class StudyContext:
    """Where a study works and how it reports.

    Args:
        name: of the study.
        size: "tiny", "paper" ...: a key of the study's ``SIZES``.
        root: folder of all studies; the study's own is ``root/name``, trained models are in ``root/runs``.
        workers: trainings that may run at the same time, each on its share of the machine.
        say: prints a line of progress.
        checkpoint: a trained model to measure instead of training one; not all studies take one.
        settings_mark: tells measurements with these settings from those with others.
    """

    name: str
    size: str
    root: Path
    workers: int = 1
    say: Callable[[str], None] = print
    checkpoint: Optional[Path] = None
    settings_mark: str = ""

    @property
    def folder(self) -> Path:
        """The study's own."""
        return self.root / self.name

    @property
    def runs(self) -> Path:
        """Trained models, shared by the studies."""
        return self.root / "runs"

    def once(self, name: str, measure: Callable[[], T]) -> T:
        """A measurement that is kept as JSON in the study's folder, so that an interrupted study goes on behind it.

        Args:
            name: of the file, without suffix; it must name all that the measurement depends on but the settings.
            measure: returns what JSON can hold.
        """
        path = self.folder / f"measured{self.settings_mark}" / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        value = measure()
        write_json(path, value)
        return json.loads(json.dumps(value))


def settings_mark(settings: Any) -> str:
    """A short name of a study's settings."""
    values = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    return "-" + hashlib.sha256(values.encode()).hexdigest()[:8]


def save_result(folder: Path, result: StudyResult, settings: Any, seconds: float) -> None:
    """Keeps a finished study, with the settings it was made with."""
    write_json(
        folder / RESULT_FILE,
        {"settings": dataclasses.asdict(settings), "seconds": seconds, **dataclasses.asdict(result)},
    )


def load_result(folder: Path, settings: Any) -> Optional[tuple[StudyResult, float]]:
    """A finished study and the seconds it took; None where it is not finished or was made with other settings."""
    path = folder / RESULT_FILE
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["settings"] != json.loads(json.dumps(dataclasses.asdict(settings))):
        return None
    result = StudyResult(
        values["finding"],
        [Table(**table) for table in values["tables"]],
        [Figure(**figure) for figure in values["figures"]],
        values["numbers"],
    )
    return result, values["seconds"]


def write_json(path: Path, value: Any) -> None:
    """Writes whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
