"""Questions about stories, as in CatbAbI (Schlag et al. 2021, "Learning Associative Inference Using Fast Weight
Memory", arXiv 2011.07831): stories one after another, a token a word; what counts is the word after each question mark,
the answer.

- ``worlds``: what stories are told of; ``generated``: as many stories as are asked for
- ``published``: the files of CatbAbI, or those of bAbI that it is made of
- ``vocabulary``, ``rows``: words as tokens, tokens as batches

Imports what ``data`` may.
"""

from __future__ import annotations

from pathlib import Path

from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data.tasks.stories.generated import GeneratedStories
from megatron_implicit.data.tasks.stories.published import PublishedStories

__all__ = ["GeneratedStories", "PublishedStories", "open_task"]


def open_task(data: DataConfig) -> GeneratedStories | PublishedStories:
    """The stories of a data section.

    Raises:
        ConfigError: unknown tasks.
        DataError: published files that are missing or damaged.
    """
    if data.stories is not None:
        return PublishedStories(Path(data.stories), data.story_tasks)
    return GeneratedStories(data.story_tasks, data.story_statements)
