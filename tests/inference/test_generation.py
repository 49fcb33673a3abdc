"""Generation: greedy against whole-sequence forwards, sampling, stopping, and batches that change nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_implicit.errors import CapacityError, ConfigError
from megatron_implicit.inference import SolveMode
from megatron_implicit.inference.generation import TokenStream
from megatron_implicit.inference.sampling import Sampling, TokenChooser, distribution
from tests.inference.models import KINDS, VOCABULARY, random_ids, small_model, tight

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_whole_sequence_solves(kind: str) -> None:
    lm, ids = small_model(kind), random_ids(1, 6)[0].tolist()
    tokens = lm.generate([ids], 6, **tight(kind))[0].ids
    for _ in range(6):
        ids.append(int(lm(torch.tensor([ids]), **tight(kind)).logits[0, -1].argmax()))
    assert tokens == ids[6:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_generates_the_same_alone_and_in_a_batch(kind: str) -> None:
    """At the model's own tolerance, prompts of 1 to 40 tokens; samples end at different times and leave the batch."""
    lm, prompts = small_model(kind, layers=2), [random_ids(n, seed=n).tolist() for n in (7, 1, 40, 3)]
    ends = {lm.generate([prompts[2]], 4)[0].ids[-1]}
    together = lm.generate(prompts, 10, stop_ids=ends)
    assert len({len(generation.tokens) for generation in together}) > 1
    for prompt, ours in zip(prompts, together):
        alone = lm.generate([prompt], 10, stop_ids=ends)[0]
        assert ours.ids == alone.ids
        assert [entry.evaluations for entry in ours.tokens] == [entry.evaluations for entry in alone.tokens]
        assert ours.stopped == alone.stopped
        if kind.startswith("explicit"):
            assert {entry.evaluations for entry in ours.tokens} == {1}


def test_generation_stops_at_an_end_a_limit_or_a_full_cache() -> None:
    lm, prompt = small_model("explicit_llama_grouped"), [5, 6, 7]
    free = lm.generate([prompt], 8)[0]
    assert (free.stopped, len(free.tokens)) == ("length", 8)
    first = free.ids[2]
    stopped = lm.generate([prompt], 8, stop_ids=[first])[0]
    assert (stopped.stopped, stopped.ids) == ("end", free.ids[: free.ids.index(first) + 1])
    full = lm.generate([prompt], 8, capacity=5)[0]
    assert (full.stopped, full.ids) == ("cache", free.ids[:3])  # the last is drawn, and has no place in the cache


@pytest.mark.parametrize("mode", [SolveMode(chunk=1), SolveMode(chunk=3), SolveMode(window=4)])
def test_the_prompt_may_be_solved_in_any_mode(mode: SolveMode) -> None:
    lm, prompts = small_model("implicit_mamba2"), [random_ids(9).tolist(), [4]]
    expected = [generation.ids for generation in lm.generate(prompts, 5, **tight("implicit"))]
    stream = TokenStream(lm.session(2, **tight("implicit")), prompts, 5, mode=mode)
    assert [generation.ids for generation in stream.finish()] == expected


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(prompts=[[1, 2], []]), ConfigError, "prompt 2 has no tokens"),
        (dict(prompts=[]), ConfigError, "there is no prompt"),
        (dict(prompts=[[1, VOCABULARY]]), ConfigError, f"prompt 1 holds token {VOCABULARY}, outside the vocabulary"),
        (dict(prompts=[[-1]]), ConfigError, "prompt 1 holds token -1"),
        (dict(max_tokens=0), ConfigError, "max_tokens=0 must be at least 1"),
        (dict(capacity=3), CapacityError, "prompt 1: 4 tokens do not fit the cache of 3"),
        (dict(tolerence=1), ConfigError, "has no solver to override"),
    ],
)
def test_what_cannot_be_answered_is_refused(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        small_model("explicit_llama_grouped").generate(**({"prompts": [[1, 2, 3, 4]], "max_tokens": 2} | arguments))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- sampling


LOGITS = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (Sampling(1.0, top_k=2), [0.625, 0.375, 0.0, 0.0]),
        (Sampling(1.0, top_p=0.7), [0.625, 0.375, 0.0, 0.0]),
        (Sampling(1.0, top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]),
        (Sampling(1.0, top_p=1e-9), [1.0, 0.0, 0.0, 0.0]),
        (Sampling(1.0, min_p=0.2), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]),
        (Sampling(1.0, top_k=3, top_p=0.6), [0.625, 0.375, 0.0, 0.0]),
    ],
)
def test_filters_leave_the_distribution_they_should(sampling: Sampling, expected: list[float]) -> None:
    torch.testing.assert_close(distribution(LOGITS, sampling)[0], torch.tensor(expected, dtype=torch.float64))


def test_draws_follow_the_distribution() -> None:
    chooser = TokenChooser(Sampling(1.0, top_k=3, seed=3), 1)
    counts = Counter(chooser.choose(LOGITS, [0])[0] for _ in range(4000))
    for token, share in enumerate((0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95)):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)
    assert counts[3] == 0


def test_seeds_repeat_and_samples_draw_for_themselves() -> None:
    lm, prompts = small_model("explicit_mamba2"), [[1, 2], [1, 2], [3]]
    generated = [g.ids for g in lm.generate(prompts, 12, Sampling(1.0, seed=5))]
    assert generated == [g.ids for g in lm.generate(prompts, 12, Sampling(1.0, seed=5))]
    assert generated != [g.ids for g in lm.generate(prompts, 12, Sampling(1.0, seed=9))]
    assert generated[0] != generated[1]
    assert lm.generate(prompts[1:2], 12, Sampling(1.0, seed=6))[0].ids == generated[1]


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(temperature=-1.0), "temperature=-1.0 must be a number from 0 up"),
        (dict(temperature=1.0, top_k=-1), "top_k=-1 must not be negative"),
        (dict(temperature=1.0, top_p=0.0), "top_p=0.0 must lie in"),
        (dict(temperature=1.0, min_p=1.5), "min_p=1.5 must lie in"),
        (dict(top_k=5), "top_k has no effect at temperature=0"),
    ],
)
def test_impossible_sampling_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)
