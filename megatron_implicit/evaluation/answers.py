"""What a model answers to the questions of stories, and the evaluations it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Sequence

import torch

from megatron_implicit.data.tasks.stories.vocabulary import END_ID, PAD_ID, QUESTION, STOP, Vocabulary

if TYPE_CHECKING:
    from megatron_implicit.api import PretrainedModel


@dataclass(frozen=True)
class Answers:
    """To the questions of one story."""

    told: list[int]
    """Statements before each question."""
    right: list[bool]
    """Whether the likeliest word of the whole vocabulary was the answer."""
    evaluations: int
    """Passes of F that the story's solve took."""
    converged: bool
    """Whether it reached the tolerance."""


@torch.no_grad()
def answer_stories(
    lm: PretrainedModel, stories: Sequence[Sequence[int]], vocabulary: Vocabulary, batch_tokens: int = 8192,
    **solver_overrides: Any,
) -> list[Answers]:  # fmt: skip
    """Reads each story from its beginning, as the only one, all its tokens solved at once; no batch changes an answer.

    Args:
        lm: in eval mode.
        stories: tokens, without the one that separates stories; the word after each question mark is the answer.
        vocabulary: of the tokens.
        batch_tokens: tokens that are solved at a time, about.
        solver_overrides: values of the config's ``inference`` section, for an implicit model.
    """
    answers: list[Answers] = []
    longest = max(map(len, stories))
    size = max(1, batch_tokens // longest)
    for first in range(0, len(stories), size):
        batch = [torch.tensor([END_ID, *story]) for story in stories[first : first + size]]
        rows = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=PAD_ID)
        lengths = torch.tensor([len(story) - 1 for story in batch])
        out = lm(rows[:, : int(lengths.max())], lengths=lengths, **solver_overrides)
        said = out.logits.argmax(dim=-1).cpu()
        answers += [
            _judge(story, said[row], vocabulary, int(out.trace.evaluations[row]), bool(out.trace.converged[row]))
            for row, story in enumerate(batch)
        ]
    return answers


def _judge(
    story: torch.Tensor, said: torch.Tensor, vocabulary: Vocabulary, evaluations: int, converged: bool
) -> Answers:
    """Compares the answers of one story [tokens] with what was said behind each of its tokens."""
    asked = (story[:-1] == vocabulary.id(QUESTION)).nonzero()[:, 0]
    told = (story == vocabulary.id(STOP)).cumsum(0)
    return Answers(
        told[asked].tolist(), (said[asked] == story[asked + 1]).tolist(), evaluations, converged
    )
