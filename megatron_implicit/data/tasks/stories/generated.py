"""Generated stories, as many as are asked for, of any length, in the form of the published ones."""

from __future__ import annotations

import random
from typing import Sequence

import numpy as np

from megatron_implicit.data.sampling import Batch
from megatron_implicit.data.tasks.base import Split
from megatron_implicit.data.tasks.stories.rows import batch_of_rows
from megatron_implicit.data.tasks.stories.vocabulary import END_ID
from megatron_implicit.data.tasks.stories.worlds import VOCABULARY, WORLDS, Draw
from megatron_implicit.errors import ConfigError

LONGEST_SILENCE = 3
"""Statements after which a question is always asked."""
SHORTEST_ROW = 24
"""Tokens that are sure to hold a question with its answer."""


class GeneratedStories:
    """Stories of small worlds.

    Args:
        tasks: names of ``WORLDS``, told equally often; empty means all.
        statements: of the longest story; lengths are drawn uniformly from 1 on.

    Raises:
        ConfigError: an unknown task, or no statements.
    """

    vocabulary = VOCABULARY
    vocab_size = len(VOCABULARY)

    def __init__(self, tasks: Sequence[str] = (), statements: int = 12) -> None:
        unknown = [name for name in tasks if name not in WORLDS]
        if unknown:
            raise ConfigError(f"data.story_tasks={unknown[0]} is not told here: use some of {', '.join(WORLDS)}")
        if statements < 1:
            raise ConfigError(f"data.story_statements={statements} must be at least 1")
        self.tasks, self.statements = tuple(tasks or WORLDS), statements
        self.fingerprint = f"stories:{','.join(self.tasks)}:{statements}:1"

    def samples(self, split: Split, count: int, sequence_length: int, seed: int) -> "GeneratedSamples":
        """See ``Task``.

        Raises:
            ConfigError: samples so short that there might be no question in them.
        """
        if sequence_length < SHORTEST_ROW:
            raise ConfigError(
                f"data.sequence_length={sequence_length} may leave a sample without a question: use at least "
                f"{SHORTEST_ROW}"
            )
        return GeneratedSamples(self, split, count, sequence_length, seed)

    def tell(self, task: str, statements: int, count: int) -> list[list[int]]:
        """Tokens of test stories of one task with exactly so many statements, the same at every call."""
        return [tell_story(task, statements, draws(f"told/{task}/{statements}/{number}")) for number in range(count)]


class GeneratedSamples:
    """Rows of stories one after another; the last one is cut where the row ends."""

    def __init__(self, task: GeneratedStories, split: Split, count: int, length: int, seed: int) -> None:
        self._task, self._count, self._length = task, count, length
        self._key = f"{seed}/{split}/{length}"

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: range) -> Batch:
        """See ``TaskSamples``."""
        return batch_of_rows(np.array([self._row(index) for index in indices]), self._task.vocabulary)

    def _row(self, index: int) -> list[int]:
        """[s + 1] tokens."""
        draw, row, task = draws(f"{self._key}/{index}"), [], self._task
        while len(row) <= self._length:
            name = task.tasks[draw(len(task.tasks))]
            row += [END_ID, *tell_story(name, 1 + draw(task.statements), draw)]
        return row[: self._length + 1]


def draws(key: str) -> Draw:
    """Random numbers that the key determines, the same with every version of Python."""
    uniform = random.Random(key).random
    return lambda below: int(uniform() * below)


def tell_story(task: str, statements: int, draw: Draw) -> list[int]:
    """Statements with questions between them and one at the end, each followed by its answer.

    Args:
        task: one of ``WORLDS``.
        statements: how many.
        draw: source of everything that is random.

    Returns:
        tokens, without the one that separates stories.
    """
    world, story, silence = WORLDS[task](), [], 0
    for left in range(statements, 0, -1):
        story += world.tell(draw)
        silence += 1
        if left == 1 or silence == LONGEST_SILENCE or draw(2):
            story += world.ask(draw)
            silence = 0
    return story
