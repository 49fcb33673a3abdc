"""The published stories: CatbAbI's files, or the bAbI files that CatbAbI is made of.

CatbAbI (``en-valid-10k_{train,valid,test}.txt``, or ``en-valid_...`` with a tenth of the questions) has a story a
line: the task's number, a tab, and the story's words with spaces between them, in small letters; ``.`` and ``?``
are words, and the word after each ``?`` is the answer (several things are one word, ``apple,football``). It is
bAbI's folder ``en-valid-10k`` (or ``en-valid``), files ``qa<task>_{train,valid,test}.txt``, in another form: a
numbered line a sentence, 1 at a story's beginning; questions have a tab, the answer, a tab and the numbers of the
lines that support it. Both give the same stories here.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np

from megatron_implicit.data.sampling import Batch
from megatron_implicit.data.tasks.base import Split
from megatron_implicit.data.tasks.stories.rows import batch_of_rows
from megatron_implicit.data.tasks.stories.vocabulary import END_ID, PAD_ID, QUESTION, STOP, Vocabulary
from megatron_implicit.errors import DataError

PREFIXES = ("en-valid-10k", "en-valid")
"""Of CatbAbI's files; the first that is there is read."""
_FILE_SPLITS: dict[Split, str] = {"train": "train", "validation": "valid", "test": "test"}
_SPLIT_NUMBERS: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}
_BABI_FILE = re.compile(r"qa(\d+)_(?:.*_)?(train|valid|test)\.txt")


@dataclass(frozen=True)
class Story:
    """A story of a file."""

    task: str
    """The task's number."""
    words: tuple[str, ...]


class PublishedStories:
    """The stories of a folder.

    Args:
        folder: with the files named above.
        tasks: numbers of the tasks to read; empty means all.

    Raises:
        DataError: no such files, files that are not in the format, or tasks without stories; names the remedy.
    """

    def __init__(self, folder: Path, tasks: Sequence[str] = ()) -> None:
        self._stories = {split: _read_split(folder, split) for split in _FILE_SPLITS}
        everything = [story for stories in self._stories.values() for story in stories]
        self.vocabulary = Vocabulary(word for story in everything for word in story.words)
        self.vocab_size = len(self.vocabulary)
        self.tasks = tuple(tasks) or tuple(sorted({story.task for story in everything}, key=int))
        for task in self.tasks:
            if not any(story.task == task for story in self._stories["train"]):
                raise DataError(f"data.story_tasks={task}: {folder} has no stories of that number to train on")
        digest = hashlib.sha256("\n".join(f"{story.task} {' '.join(story.words)}" for story in everything).encode())
        self.fingerprint = f"catbabi:{','.join(self.tasks)}:{digest.hexdigest()[:16]}:1"

    def stories(self, split: Split) -> list[tuple[str, list[int]]]:
        """Task and tokens of a split's stories, without the token that separates them, in the files' order."""
        return [
            (story.task, [self.vocabulary.id(word) for word in story.words])
            for story in self._stories[split] if story.task in self.tasks
        ]  # fmt: skip

    def tell(self, task: str, statements: int, count: int) -> list[list[int]]:
        """Tokens of the first ``count`` test stories of one task with at most so many statements and more than half."""
        stop = self.vocabulary.id(STOP)
        tokens = [tokens for name, tokens in self.stories("test") if name == task]
        return [story for story in tokens if statements / 2 < story.count(stop) <= statements][:count]

    def samples(self, split: Split, count: int, sequence_length: int, seed: int) -> "PublishedSamples":
        """See ``Task``; the training stories are told again in another order when all have been.

        Raises:
            DataError: no story asks anything within ``sequence_length`` tokens.
        """
        question = self.vocabulary.id(QUESTION)
        rows = [np.array([END_ID, *tokens][: sequence_length + 1], np.int32) for _, tokens in self.stories(split)]
        rows = [row for row in rows if (row[:-1] == question).any()]
        if not rows:
            raise DataError(
                f"no {split} story has a question within data.sequence_length={sequence_length} tokens: raise it"
            )
        return PublishedSamples(rows, self.vocabulary, count, sequence_length, [seed, _SPLIT_NUMBERS[split]])


class PublishedSamples:
    """Rows of whole stories one after another, as many as fit; a story longer than a row is cut.

    Args:
        stories: tokens of each, the separating one first, cut to a row; each holds a question.
        vocabulary: of the tokens.
        count: samples that may be read.
        length: tokens of a sample.
        key: of the order.
    """

    def __init__(
        self, stories: Sequence[np.ndarray], vocabulary: Vocabulary, count: int, length: int, key: list[int]
    ) -> None:
        self._stories, self._vocabulary, self._count, self._length, self._key = stories, vocabulary, count, length, key
        self._sizes = np.array([len(story) for story in stories])
        self._rows: list[np.ndarray] = []
        """Numbers of the stories in each row, as far as they have been asked for."""
        self._rounds = 0

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: range) -> Batch:
        """See ``TaskSamples``."""
        while len(self._rows) < indices.stop:
            self._rows += self._next_round()
        rows = np.full((len(indices), self._length + 1), PAD_ID, np.int32)
        for row, index in zip(rows, indices):
            told = np.concatenate([self._stories[number] for number in self._rows[index]])
            row[: len(told)] = told
        return batch_of_rows(rows, self._vocabulary)

    def _next_round(self) -> list[np.ndarray]:
        """All stories once, in an order of their own."""
        order = np.random.default_rng([*self._key, self._rounds]).permutation(len(self._stories))
        self._rounds += 1
        ends, rows, first = self._sizes[order].cumsum(), [], 0
        while first < len(order):
            begin = ends[first] - self._sizes[order[first]]
            behind = int(np.searchsorted(ends, begin + self._length + 1, side="right"))
            rows.append(order[first:behind])
            first = behind
        return rows


def _read_split(folder: Path, split: Split) -> list[Story]:
    name = _FILE_SPLITS[split]
    for prefix in PREFIXES:
        path = folder / f"{prefix}_{name}.txt"
        if path.is_file():
            return list(_read_catbabi(path))
    matches = [(_BABI_FILE.fullmatch(path.name), path) for path in sorted(folder.glob("qa*.txt"))]
    files = sorted((int(match[1]), path) for match, path in matches if match and match[2] == name)
    if not files:
        raise DataError(
            f"data.stories={folder} has neither {PREFIXES[0]}_{name}.txt (CatbAbI) nor qa1_{name}.txt (bAbI): name the "
            "folder that catbAbI's preprocessing wrote, or en-valid-10k of tasks_1-20_v1-2.tar.gz, or drop data.stories"
        )
    return [story for task, path in files for story in _read_babi(path, str(task))]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line that is not empty, with where it is."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text ({error.reason} at byte {error.start}): copy it again") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield line, f"{path}:{number}"


def _read_catbabi(path: Path) -> Iterator[Story]:
    for line, where in _lines(path):
        task, tab, text = line.partition("\t")
        words = tuple(text.split())
        if not tab or not task.isdecimal() or QUESTION not in words or words[-1] == QUESTION:
            raise DataError(
                f"{where} is not a task's number, a tab and a story with answered questions: copy the file again"
            )
        yield Story(task, words)


def _read_babi(path: Path, task: str) -> Iterator[Story]:
    words: list[str] = []
    for line, where in _lines(path):
        number, _, text = line.lower().partition(" ")
        if not number.isdecimal():
            raise DataError(f"{where} does not begin with a line's number, as bAbI's files do: copy the file again")
        if number == "1" and words:
            yield Story(task, tuple(words))
            words = []
        words += _sentence(text.strip(), where)
    if words:
        yield Story(task, tuple(words))


def _sentence(text: str, where: str) -> list[str]:
    """Words of a statement, or of a question with its answer."""
    question, tab, rest = text.partition("\t")
    question = question.strip()
    if not tab and question.endswith(STOP):
        return [*question[:-1].split(), STOP]
    answer = rest.split("\t")[0].strip()
    if not tab or not question.endswith(QUESTION) or not answer or " " in answer:
        raise DataError(f"{where} is neither a statement nor a question, a tab and an answer: copy the file again")
    return [*question[:-1].split(), QUESTION, answer]
