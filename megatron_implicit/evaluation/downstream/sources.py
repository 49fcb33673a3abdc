"""The tasks' files: what they are called where they are published, finding them in a folder, and reading them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator

from megatron_implicit.errors import ConfigError, DataError

_ARC = "ARC-V1-Feb2018-2"
PLACES: dict[str, tuple[str, ...]] = {
    "lambada": ("lambada_test.jsonl",),
    "hellaswag": ("hellaswag_val.jsonl",),
    "piqa": ("physicaliqa-train-dev/dev.jsonl", "piqa/valid.jsonl", "piqa/dev.jsonl"),
    "arc_easy": (f"{_ARC}/ARC-Easy/ARC-Easy-Test.jsonl", "ARC-Easy-Test.jsonl"),
    "arc_challenge": (f"{_ARC}/ARC-Challenge/ARC-Challenge-Test.jsonl", "ARC-Challenge-Test.jsonl"),
    "winogrande": ("winogrande_1.1/dev.jsonl", "winogrande/dev.jsonl"),
    "openbookqa": ("OpenBookQA-V1-Sep2018/Data/Main/test.jsonl", "openbookqa/test.jsonl"),
}
"""Where each task's questions may lie below the data folder, by the task's name; first as its archive unpacks."""


def choose_tasks(names: str | None) -> list[str]:
    """The tasks of a list like "piqa,lambada"; None means all.

    Raises:
        ConfigError: a task that is not known.
    """
    chosen = [name.strip() for name in names.split(",")] if names else list(PLACES)
    for name in chosen:
        if name not in PLACES:
            raise ConfigError(f"--tasks {names}: there is no task {name!r}; choose from {','.join(PLACES)}")
    return list(dict.fromkeys(chosen))


def find_questions(folder: Path, task: str) -> Path | None:
    """The file of a task's questions, or None."""
    return next((folder / place for place in PLACES[task] if (folder / place).is_file()), None)


def find_labels(questions: Path) -> Path:
    """PIQA's answers: dev.jsonl has them in dev-labels.lst beside it."""
    return questions.with_name(f"{questions.stem}-labels.lst")


def check_files(folder: Path, tasks: Iterable[str]) -> None:
    """Looks for the files of all tasks before anything long is begun.

    Raises:
        DataError: files that are missing, by name, in one line.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder} is not a folder: put the tasks' files into one (docs/downstream.md)")
    missing = [f"{wanted} ({task})" for task in tasks for wanted in _missing(folder, task)]
    if missing:
        raise DataError(
            f"--data {folder} has no {', no '.join(missing)}: docs/downstream.md says where they are published, "
            "--tasks chooses others"
        )


def _missing(folder: Path, task: str) -> Iterator[str]:
    questions = find_questions(folder, task)
    if questions is None:
        yield PLACES[task][0]
    elif task == "piqa" and not find_labels(questions).is_file():
        yield str(find_labels(questions).relative_to(folder))


@dataclass(frozen=True)
class Row:
    """One line of a .jsonl file."""

    values: dict[str, Any]
    place: str
    """File and line, for errors."""

    def get(self, *path: str, kind: type = str) -> Any:
        """The value of a field, or of a field of a field, which must be of this kind.

        Raises:
            DataError: there is none.
        """
        value: Any = self.values
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise self.error(f"no {'.'.join(path)} that is a {kind.__name__}")
        return value

    def error(self, what: str) -> DataError:
        """That this line is not as published."""
        return DataError(f"{self.place}: {what}; is this the file as published (docs/downstream.md)?")


def read_rows(path: Path) -> list[Row]:
    """The objects of a .jsonl file.

    Raises:
        DataError: it cannot be read, a line is not an object, or there is none.
    """
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        row = Row(values, f"{path}, line {number}")
        if not isinstance(values, dict):
            raise row.error("not a JSON object")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} is empty")
    return rows


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, without empty ones at its end.

    Raises:
        DataError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None
    return text.rstrip("\n").split("\n") if text.strip() else []
