"""Answers to the questions of stories."""

from __future__ import annotations

import pytest
import torch

from megatron_implicit.data.tasks.stories.generated import draws, tell_story
from megatron_implicit.data.tasks.stories.worlds import VOCABULARY
from megatron_implicit.evaluation.answers import answer_stories
from tests.inference.models import small_model, tight

pytestmark = pytest.mark.usefixtures("one_process")
STORIES = [tell_story(task, 2 + number, draws(str(number))) for number, task in enumerate(("people", "turns", "lists"))]


@pytest.mark.parametrize("kind", ["implicit_mamba2", "explicit_mamba2"])
def test_a_story_is_answered_as_if_it_were_read_alone(kind: str) -> None:
    lm, overrides = small_model(kind), tight(kind)
    answers = answer_stories(lm, STORIES, VOCABULARY, **overrides)
    assert answers == [answer_stories(lm, [story], VOCABULARY, **overrides)[0] for story in STORIES]
    assert answers == answer_stories(lm, STORIES, VOCABULARY, batch_tokens=1, **overrides)
    for story, answer in zip(STORIES, answers):
        said = lm(torch.tensor([[1, *story]]), **overrides).logits[0].argmax(dim=-1).tolist()
        words, right, told = [1, *story], [], []
        for place, word in enumerate(words):
            if VOCABULARY.words[word] == "?":
                right.append(said[place] == words[place + 1])
                told.append(words[:place].count(VOCABULARY.id(".")))
        assert (answer.right, answer.told) == (right, told)
    assert all((answer.evaluations > 1) == kind.startswith("implicit") for answer in answers)
