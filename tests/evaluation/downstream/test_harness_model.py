"""The model as lm-eval sees it, against the logits of the model itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from megatron_implicit.api import PretrainedModel
from megatron_implicit.data.tokenizers import Tokenizer
from megatron_implicit.errors import ConfigError, DataError
from megatron_implicit.evaluation.downstream.harness_model import HarnessModel, HowToSolve
from tests.inference.models import golden, small_model

pytestmark = pytest.mark.usefixtures("one_process")
MODES: list[dict[str, Any]] = [
    {"mode": "simultaneous"}, {"mode": "sequential"}, {"mode": "chunked", "chunk_size": 5},
    {"mode": "window", "window_size": 4},
]  # fmt: skip
PAIRS = [
    ("The baker had promised her", " a loaf"),
    ("Ice", " melts."),
    ("", "No context"),
    ("A context that ends in a space ", "goes on"),
    ("Question: Which?\nAnswer:", " this one, which has more"),
    ("Ruth", " wrote"),
]
"""Of lengths that differ, and that a batch of 4 mixes."""


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def harness(tokenizer: Tokenizer, family: str = "implicit_mamba2", **options: Any) -> HarnessModel:
    how = HowToSolve(**options.pop("how", {}))
    return HarnessModel(golden(family), tokenizer, how, **{"max_length": 64, **options})


@torch.no_grad()
def alone(lm: PretrainedModel, ids: list[int], scored: int, **how: Any) -> tuple[float, bool]:
    """(log-probability of the last ``scored`` ids, whether each was the likeliest), one token after another."""
    logits = lm(torch.tensor([ids[:-1]]), **how).logits[0].double()
    total, greedy = 0.0, True
    for place in range(len(ids) - scored, len(ids)):
        total += float(torch.log_softmax(logits[place - 1], -1)[ids[place]])
        greedy &= int(logits[place - 1].argmax()) == ids[place]
    return total, greedy


def expected(tokenizer: Tokenizer, lm: PretrainedModel, how: dict[str, Any]) -> list[tuple[float, bool]]:
    """Of PAIRS, each by itself."""
    found = []
    for context, continuation in PAIRS:
        before = len(tokenizer.encode(context.rstrip())) if context else 1
        ids = tokenizer.encode(context + continuation) if context else [tokenizer.eod, *tokenizer.encode(continuation)]
        found.append(alone(lm, ids, len(ids) - before, **how))
    return found


@pytest.mark.parametrize("how", MODES, ids=lambda how: how["mode"])
@pytest.mark.parametrize("family", ["implicit_mamba2", "implicit_llama"])
def test_loglikelihoods_are_those_of_the_logits(tokenizer: Tokenizer, family: str, how: dict[str, Any]) -> None:
    wanted = expected(tokenizer, golden(family), how)
    for batch_size in (1, 4, 6) if how["mode"] == "simultaneous" else (4,):
        model = harness(tokenizer, family, how=how, batch_size=batch_size)
        answers = model.loglikelihood(requests("loglikelihood", PAIRS))
        assert [score for score, _ in answers] == pytest.approx([score for score, _ in wanted], abs=1e-5, rel=0)
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in wanted]
        assert model.get_model_info()["evaluations_mean"] > 1


@pytest.mark.parametrize("family", ["explicit_mamba2", "explicit_llama"])
def test_explicit_models_take_one_evaluation_a_token(tokenizer: Tokenizer, family: str) -> None:
    model = harness(tokenizer, family, batch_size=4)
    answers = model.loglikelihood(requests("loglikelihood", PAIRS))
    wanted = expected(tokenizer, golden(family), {})
    assert [score for score, _ in answers] == pytest.approx([score for score, _ in wanted], abs=1e-5, rel=0)
    info = model.get_model_info()
    assert (info["evaluations_mean"], info["unconverged_fraction"]) == (1, 0)


def test_what_greedy_decoding_gives_is_flagged(tokenizer: Tokenizer) -> None:
    model = harness(tokenizer)
    context = [*tokenizer.encode("The baker"), 40]
    logits = model.lm(torch.tensor([context])).logits[0, -1]
    likeliest, second = logits.topk(2).indices.tolist()
    answers = model._loglikelihood_tokens([(("", ""), context, [token]) for token in (likeliest, second)])
    assert [greedy for _, greedy in answers] == [True, False]
    assert answers[0][0] > answers[1][0]
    assert answers[0][0] == pytest.approx(float(logits.log_softmax(-1)[likeliest]), abs=1e-5)


def test_a_long_context_loses_its_beginning(tokenizer: Tokenizer) -> None:
    context, continuation = "one two three four five six seven eight nine ten", " eleven twelve"
    ids, tail = tokenizer.encode(context + continuation), len(tokenizer.encode(continuation))
    model = harness(tokenizer, max_length=len(ids) - 6)
    (found,) = model.loglikelihood(requests("loglikelihood", [(context, continuation)]))
    assert found[0] == pytest.approx(alone(model.lm, ids[5:], tail)[0], abs=1e-5)
    whole = alone(model.lm, ids, tail)[0]
    assert abs(found[0] - whole) > 1e-5, "a test that could not fail"


@pytest.mark.parametrize("mode", ["simultaneous", "sequential"])
def test_a_whole_text_is_scored_in_windows(tokenizer: Tokenizer, mode: str) -> None:
    """Windows of 8: every token once, the first after an end of text, the last window with as much context as fits."""
    text = "longer than two windows of it"
    ids, size, how = tokenizer.encode(text), 8, {"mode": mode}
    assert len(ids) % size and len(ids) > 2 * size
    model = harness(tokenizer, how={"mode": mode}, max_length=size, batch_size=3)
    total = alone(model.lm, [tokenizer.eod, *ids[:size]], size, **how)[0]
    for start in range(size, len(ids), size):
        end = min(start + size, len(ids))
        total += alone(model.lm, ids[end - size - 1 : end], end - start, **how)[0]
    scores = model.loglikelihood_rolling(requests("loglikelihood_rolling", [("Ice",), (text,), ("",)]))
    assert scores[1] == pytest.approx(total, abs=1e-4)
    assert scores[0] == pytest.approx(model.loglikelihood(requests("loglikelihood", [("", "Ice")]))[0][0], abs=1e-5)
    assert scores[2] == 0.0


def test_generation_ends_before_a_stop_string(tokenizer: Tokenizer) -> None:
    model = harness(tokenizer, batch_size=2)
    prompts = ["The baker had promised", "Ice", "Two men push a boat into the"]
    texts = []
    for prompt in prompts:
        (generation,) = model.lm.generate([tokenizer.encode(prompt)], 8, stop_ids=[tokenizer.eod])
        texts.append(tokenizer.decode(token for token in generation.ids if token != tokenizer.eod))
    longest = max(texts, key=len)
    stop = longest[len(longest) // 2 :][:2]
    assert stop
    for until in ([], [stop], stop, ["never in it", stop]):
        found = model.generate_until(
            requests("generate_until", [(prompt, {"until": until, "max_gen_toks": 8}) for prompt in prompts])
        )
        assert found == [text.split(stop)[0] if until else text for text in texts]
    mixed = [(prompts[0], {"max_gen_toks": 8}), (prompts[0], {"until": [stop], "max_gen_toks": 8})]
    assert model.generate_until(requests("generate_until", mixed)) == [texts[0], texts[0].split(stop)[0]]


def test_generation_draws_where_a_task_says_so(tokenizer: Tokenizer) -> None:
    model = harness(tokenizer)
    drawn = [("Ice", {"do_sample": True, "temperature": 5.0, "top_k": 50, "max_gen_toks": 8})]
    greedy = [("Ice", {"do_sample": False, "max_gen_toks": 8})]
    first = model.generate_until(requests("generate_until", drawn))
    assert first == model.generate_until(requests("generate_until", drawn))
    assert first != model.generate_until(requests("generate_until", greedy))


def test_a_long_prompt_makes_room_for_what_is_generated(tokenizer: Tokenizer) -> None:
    model = harness(tokenizer, "implicit_llama", max_length=16)
    prompt = "a prompt that has many more tokens than sixteen of them, and goes on"
    (text,) = model.generate_until(requests("generate_until", [(prompt, {"max_gen_toks": 6})]))
    (same,) = model.lm.generate([tokenizer.encode(prompt)[-10:]], 6, stop_ids=[tokenizer.eod])
    assert text == tokenizer.decode(token for token in same.ids if token != tokenizer.eod)
    with pytest.raises(ConfigError, match="max_length=16 leaves no room"):
        model.generate_until(requests("generate_until", [(prompt, {"max_gen_toks": 16})]))


def test_what_cannot_be_scored_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="max_length=4 is less than the"):
        harness(tokenizer, max_length=4).loglikelihood(requests("loglikelihood", [("Ice", " melts in the warm sun")]))
    with pytest.raises(DataError, match="no token of its own"):
        harness(tokenizer).loglikelihood(requests("loglikelihood", [("Ice", "")]))
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        harness(tokenizer, batch_size=0)
    with pytest.raises(ConfigError, match="the tokenizer has .* tokens and the model 96"):
        HarnessModel(small_model("implicit_mamba2"), tokenizer)
    with pytest.raises(ConfigError, match="chunk_size=None must be a positive number"):
        HowToSolve("chunked")


def test_progress_is_reported(tokenizer: Tokenizer) -> None:
    seen: list[tuple[int, int]] = []
    model = harness(tokenizer, batch_size=4, report=lambda done, total: seen.append((done, total)))
    scores = model.loglikelihood(requests("loglikelihood", PAIRS))
    assert seen == [(4, 6), (6, 6)] and all(math.isfinite(score) for score, _ in scores)
