"""Training data other than text: tasks with a vocabulary of their own, generated or read, named by ``data.task``.

- ``base``: the ``Task`` protocol
- ``groups``: multiplication tables of groups and monoids; ``word_problem``: running products in them
- ``stories``: questions about stories

A new task is a module with a function ``open_task(data: DataConfig) -> Task``, named in ``TASKS``. Imports what
``data`` may.
"""

from __future__ import annotations

import importlib

from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data.tasks.base import Split, Task, TaskSamples
from megatron_implicit.errors import ConfigError

__all__ = ["Split", "TASKS", "Task", "TaskSamples", "open_task"]

TASKS = {
    "word_problem": "megatron_implicit.data.tasks.word_problem",
    "stories": "megatron_implicit.data.tasks.stories",
}
"""Modules by ``data.task``."""


def open_task(data: DataConfig) -> Task:
    """The task that a data section describes.

    Raises:
        ConfigError: ``data.task`` is no such task, or its settings are impossible.
        DataError: files it needs are missing or damaged.
    """
    if data.task not in TASKS:
        raise ConfigError(f"data.task={data.task} has no samples of its own: use one of {', '.join(TASKS)}")
    return importlib.import_module(TASKS[data.task]).open_task(data)
