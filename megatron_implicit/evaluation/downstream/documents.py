"""The tasks' documents: a published row -> the fields that ``tasks/*.yaml`` name.

Each function takes what lm-eval gives a task's ``custom_dataset`` (``data``, the folder, among its metadata) and
returns the one split that is scored. How text is put together follows what lm-eval does for the same task, so that
scores can be compared.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from megatron_implicit.evaluation.downstream.sources import (
    Row,
    check_files,
    find_labels,
    find_questions,
    read_lines,
    read_rows,
)

if TYPE_CHECKING:
    from datasets import Dataset

Splits = dict[str, "Dataset"]
_BRACKETS = re.compile(r"\[.*?\]")
_BLANK = "_"


def lambada(data: str, **_: Any) -> Splits:
    """context, target: a passage and its last word."""
    return _split(data, "lambada", _passage)


def hellaswag(data: str, **_: Any) -> Splits:
    """question, choices, label: a scene and four ways it may go on."""
    return _split(data, "hellaswag", _scene)


def piqa(data: str, **_: Any) -> Splits:
    """question, choices, label: a goal and two ways to reach it; the labels are in a file of their own."""
    questions = _questions(data, "piqa")
    rows, labels = read_rows(questions), read_lines(find_labels(questions))
    if len(rows) != len(labels):
        raise rows[-1].error(f"{len(rows)} lines, but {len(labels)} labels in {find_labels(questions).name}")
    return _as_split(_goal(row, label.strip()) for row, label in zip(rows, labels))


def arc_easy(data: str, **_: Any) -> Splits:
    """question, choices, label of the ARC questions that simple methods answer."""
    return _split(data, "arc_easy", _lettered)


def arc_challenge(data: str, **_: Any) -> Splits:
    """question, choices, label of the ARC questions that simple methods get wrong."""
    return _split(data, "arc_challenge", _lettered)


def winogrande(data: str, **_: Any) -> Splits:
    """contexts, continuation, label: a sentence up to its blank with either name in it, and what follows the blank."""
    return _split(data, "winogrande", _blank)


def openbookqa(data: str, **_: Any) -> Splits:
    """question, choices, label of the questions without the book's facts."""
    return _split(data, "openbookqa", _lettered)


def _split(folder: str, task: str, document: Callable[[Row], dict[str, Any]]) -> Splits:
    return _as_split(document(row) for row in read_rows(_questions(folder, task)))


def _questions(folder: str, task: str) -> Path:
    check_files(Path(folder), [task])
    return find_questions(Path(folder), task)


def _as_split(documents: Any) -> Splits:
    from datasets import Dataset

    return {"test": Dataset.from_list(list(documents))}


def _passage(row: Row) -> dict[str, Any]:
    context, space, word = row.get("text").rpartition(" ")
    if not space or not word:
        raise row.error("the text does not end in a word after a space")
    return {"context": context, "target": f" {word}"}


def _scene(row: Row) -> dict[str, Any]:
    scene = f"{row.get('activity_label')}: {row.get('ctx_a')} {row.get('ctx_b').capitalize()}"
    endings = row.get("endings", kind=list)
    return {
        "question": _without_wikihow_marks(scene),
        "choices": [_without_wikihow_marks(ending) for ending in endings],
        "label": _index(row, row.get("label", kind=int), len(endings)),
    }


def _without_wikihow_marks(text: str) -> str:
    """HellaSwag's texts from WikiHow carry [title], [step] and the like."""
    return _BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _goal(row: Row, label: str) -> dict[str, Any]:
    if label not in ("0", "1"):
        raise row.error(f"label {label!r} is not 0 or 1")
    return {"question": row.get("goal"), "choices": [row.get("sol1"), row.get("sol2")], "label": int(label)}


def _lettered(row: Row) -> dict[str, Any]:
    """ARC and OpenBookQA: choices with letters or numbers, one of which is the answer."""
    choices = row.get("question", "choices", kind=list)
    try:
        texts = {choice["label"]: choice["text"] for choice in choices}
    except (KeyError, TypeError):
        raise row.error("a choice without label and text") from None
    answer = row.get("answerKey").strip()
    if answer not in texts:
        raise row.error(f"answerKey {answer!r} is not among the choices {', '.join(texts)}")
    return {
        "question": row.get("question", "stem"),
        "choices": list(texts.values()),
        "label": list(texts).index(answer),
    }


def _blank(row: Row) -> dict[str, Any]:
    before, blank, after = row.get("sentence").partition(_BLANK)
    answer = row.get("answer")
    if not blank or answer not in ("1", "2"):
        raise row.error(f"no blank {_BLANK} in the sentence" if not blank else f"answer {answer!r} is not 1 or 2")
    return {
        "contexts": [before + row.get("option1"), before + row.get("option2")],
        "continuation": after.strip(),
        "label": int(answer) - 1,
    }


def _index(row: Row, label: int, choices: int) -> int:
    if not 0 <= label < choices:
        raise row.error(f"label {label} of {choices} endings")
    return label
