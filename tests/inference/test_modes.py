"""Simultaneous, sequential, chunked and window solves agree, whatever a sample's companions and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_implicit.inference import InferenceSession, Padding, SolveMode
from tests import goldens
from tests.inference.models import KINDS, golden, random_ids, small_model, tight

pytestmark = pytest.mark.usefixtures("one_process")

MODES: list[dict[str, Any]] = [
    dict(mode="simultaneous"), dict(mode="sequential"), dict(mode="chunked", chunk_size=5),
    dict(mode="window", window_size=4),
]  # fmt: skip
MODE_NAMES = [entry["mode"] for entry in MODES]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "implicit_llama"])  # which the goldens have
def test_every_chunk_and_window_size_agrees_with_the_simultaneous_solve(kind: str) -> None:
    lm, ids = small_model(kind), random_ids(1, 256)
    whole = lm(ids, **tight(kind))
    assert whole.trace.converged.all()
    for chunk in (1, 3, 16, 64, 256):
        out = lm(ids, mode="chunked", chunk_size=chunk, **tight(kind))
        assert distance(out.logits, whole.logits) <= 1e-4, chunk
        assert out.trace.evaluations.shape == (1, 256)
    for window in (4, 300):
        out = lm(ids, mode="window", window_size=window, **tight(kind))
        assert distance(out.logits, whole.logits) <= 1e-4, window


@pytest.mark.parametrize("family", goldens.IMPLICIT)
def test_the_golden_models_agree_over_modes_and_with_their_float64_fixed_point(family: str) -> None:
    ids = torch.from_numpy(goldens.arrays(family)["input_ids"])
    expected = goldens.tensor(family, "fp/logits").float()
    for mode in MODES:
        out = golden(family)(ids, **mode, tolerance=1e-6, max_iterations=400)
        assert distance(out.logits, expected) <= 1e-4, mode


@pytest.mark.parametrize(
    "chunks", [(1,), pytest.param((3, 16, 64, 256), marks=pytest.mark.acceptance)], ids=["sequential", "chunked"]
)
@pytest.mark.parametrize("family", goldens.IMPLICIT)
def test_the_golden_models_agree_on_256_tokens(family: str, chunks: tuple[int, ...]) -> None:
    """By token: these models amplify a residual so much that a norm over 256 tokens of 1e-6 leaves 3e-4 in logits."""
    lm, ids = golden(family), random_ids(1, 256)
    arguments = dict(tolerance=1e-6, max_iterations=400, residual_norm="token")
    with torch.no_grad():
        whole = lm(ids, **arguments)
        assert whole.trace.converged.all()
        for chunk in chunks:
            assert distance(lm(ids, mode="chunked", chunk_size=chunk, **arguments).logits, whole.logits) <= 1e-4, chunk


LENGTHS = [24, 1, 9, 17]


def padded(ids: Tensor, side: str) -> dict[str, Tensor]:
    """A batch with padding of other tokens on one side, as a caller would give it."""
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    batch = torch.where(mask, ids, 77)
    if side == "right":
        return dict(input_ids=batch, lengths=torch.tensor(LENGTHS))
    rows = [row.roll(ids.shape[1] - length) for row, length in zip(batch, LENGTHS)]
    return dict(input_ids=torch.stack(rows), attention_mask=mask.flip(1).long())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
def test_companions_and_padding_change_no_sample(kind: str, mode: dict[str, Any]) -> None:
    """At the model's own tolerance: same outputs, same iterations and evaluations as alone and unpadded."""
    lm, ids = small_model(kind, layers=2), random_ids(4, 24, seed=1)
    alone = [lm(ids[i : i + 1, :length], **mode) for i, length in enumerate(LENGTHS)]
    for side in ("right", "left"):
        out = lm(**padded(ids, side), **mode)
        for i, length in enumerate(LENGTHS):
            here = slice(0, length) if side == "right" else slice(24 - length, 24)
            assert distance(out.logits[i, here], alone[i].logits[0]) <= 1e-5
            assert distance(out.hidden[i, here], alone[i].hidden[0]) <= 1e-5
            for name in ("iterations", "evaluations", "converged"):
                ours, own = getattr(out.trace, name)[i], getattr(alone[i].trace, name)[0]
                assert torch.equal(ours if mode["mode"] == "simultaneous" else ours[here], own), name
            assert out.logits[i].abs().sum(-1).count_nonzero() == length


@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
def test_an_inference_solve_records_no_graph(mode: dict[str, Any]) -> None:
    out = small_model("implicit_mamba2")(random_ids(1, 6), **mode)
    assert not out.logits.requires_grad and not out.hidden.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
def test_a_batch_in_which_every_sample_is_padded(kind: str, mode: dict[str, Any]) -> None:
    """Less than a chunk or window of tokens, on either side of the padding."""
    lm, ids = small_model(kind), random_ids(2, 3)
    alone = [lm(ids[i : i + 1, :length], **mode) for i, length in enumerate((3, 2))]
    for starts in ((0, 0), (7, 8), (4, 5)):
        mask, batch = torch.zeros(2, 10, dtype=torch.long), torch.full((2, 10), 77)
        for i, (start, length) in enumerate(zip(starts, (3, 2))):
            mask[i, start : start + length], batch[i, start : start + length] = 1, ids[i, :length]
        out = lm(batch, attention_mask=mask, **mode)
        for i, (start, length) in enumerate(zip(starts, (3, 2))):
            here = slice(start, start + length)
            assert distance(out.logits[i, here], alone[i].logits[0]) <= 1e-5
            assert out.logits[i].abs().sum(-1).count_nonzero() == length
            if mode["mode"] != "simultaneous":
                assert out.trace.evaluations.shape == (2, 10)
                assert torch.equal(out.trace.evaluations[i, here], alone[i].trace.evaluations[0])


@pytest.mark.parametrize("family", goldens.IMPLICIT)
@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
def test_companions_change_no_sample_of_a_golden_model(family: str, mode: dict[str, Any]) -> None:
    lm, ids = golden(family), torch.from_numpy(goldens.arrays(family)["input_ids"])
    together = lm(ids, lengths=[24, 15], **mode)
    for i, length in enumerate((24, 15)):
        alone = lm(ids[i : i + 1, :length], **mode)
        assert distance(together.logits[i, :length], alone.logits[0]) <= 1e-5
        ours = together.trace.evaluations[i]
        assert torch.equal(ours if mode["mode"] == "simultaneous" else ours[:length], alone.trace.evaluations[0])


@pytest.mark.parametrize("mode", MODES[1:], ids=MODE_NAMES[1:])
def test_a_warm_start_finds_the_same(mode: dict[str, Any]) -> None:
    lm, ids = small_model("implicit_mamba2"), random_ids(2, 20)
    cold, warm = (lm(ids, **mode, **tight("implicit"), warm_start=warm) for warm in (False, True))
    assert distance(cold.logits, warm.logits) <= 1e-5
    assert not torch.equal(cold.trace.evaluations, warm.trace.evaluations)


def test_the_batch_norm_still_stops_all_samples_at_once() -> None:
    out = golden("implicit_llama")(
        torch.from_numpy(goldens.arrays("implicit_llama")["input_ids"]), mode="sequential", residual_norm="batch"
    )
    assert torch.equal(out.trace.evaluations[0], out.trace.evaluations[1])


# ---------------------------------------------------------------- sessions


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_goes_on_where_it_was(kind: str) -> None:
    """Segments of any lengths, ragged ones too, and samples that leave: the same as the whole at once."""
    lm, ids = small_model(kind), random_ids(3, 12)
    whole = lm(ids, **tight(kind))
    session = lm.session(3, 12, **tight(kind))
    first = session.advance(ids[:, :5], [5, 2, 4])
    assert session.positions == [5, 2, 4]
    assert distance(first.last[1], whole.hidden[1, 1]) <= 1e-4
    assert float(first.hidden[2:, 1].abs().max()) == 0.0
    rest = torch.stack([ids[i].roll(-start) for i, start in enumerate((5, 2, 4))])
    second = session.advance(rest[:, :6], [0, 6, 3])
    assert distance(second.last[0], whole.hidden[0, 4]) <= 1e-4
    assert distance(second.hidden[:, 1], whole.hidden[1, 2:8]) <= 1e-4
    session.keep([1, 2])
    third = session.advance(torch.stack((ids[1, 8:10], ids[2, 7:9])))
    assert session.positions == [10, 9]
    for row, sample, last in ((0, 1, 9), (1, 2, 8)):
        assert distance(third.last[row], whole.hidden[sample, last]) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_takes_segments_that_are_shorter_than_their_row(kind: str) -> None:
    lm, ids = small_model(kind), random_ids(2, 12)
    whole, session = lm(ids, **tight(kind)), lm.session(2, 12, **tight(kind))
    session.advance(ids[:, :3])
    second = session.advance(ids[:, 3:10], [1, 2])
    assert session.positions == [4, 5]
    for i, last in enumerate((3, 4)):
        assert distance(second.last[i], whole.hidden[i, last]) <= 1e-4


@pytest.mark.parametrize("kind", ["implicit_mamba2", "implicit_llama"])
@pytest.mark.parametrize("mode", [SolveMode(), SolveMode(chunk=2), SolveMode(window=2)])
def test_a_segment_without_tokens_changes_nothing(kind: str, mode: SolveMode) -> None:
    lm, ids = small_model(kind), random_ids(2, 4)
    session = lm.session(2, 8)
    for before in range(2):
        last = session.last
        solved = session.advance(ids, [0, 0], mode)
        assert session.positions == [4 * before, 4 * before] and torch.equal(solved.last, last)
        assert solved.hidden.shape[0] == 4 and not solved.hidden.any() and solved.trace.converged.all()
        session.advance(ids)


def test_states_of_mamba2_do_not_grow_and_caches_are_allocated_once() -> None:
    for kind, grows in (("explicit_mamba2", False), ("explicit_llama_grouped", False)):
        session = small_model(kind).session(2, 64)
        session.advance(random_ids(2, 3))
        early = session.states.nbytes
        for _ in range(40):
            session.advance(random_ids(2, 1))
        assert session.states.nbytes == early


def test_effective_weights_are_computed_once_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = small_model("implicit_mamba2")
    session = lm.session(1, 8)
    monkeypatch.setattr(type(lm.model.decoder), "effective_weights", lambda self: pytest.fail("computed again"))
    session.advance(random_ids(1, 4))
    session.advance(random_ids(1, 1))


def test_a_rejected_iterate_leaves_no_trace_in_the_states() -> None:
    """Evaluations on other z change nothing until one is accepted."""
    lm, ids = small_model("implicit_mamba2"), random_ids(1, 6)
    with torch.no_grad():
        session = InferenceSession(lm.model, 1, 6)
        session.advance(ids[:, :3])
        embedding, bound_pass = session.embed(ids[:, 3:4])
        evaluate = session.bind(bound_pass, 1, None)
        expected = evaluate(torch.zeros_like(embedding))
        evaluate(100 * torch.ones_like(embedding))
        assert torch.equal(evaluate(torch.zeros_like(embedding)), expected)


def test_padding_moves_to_the_end_and_back() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0]])
    ids = torch.tensor([[9, 9, 1, 2], [3, 4, 5, 9], [9, 6, 7, 9]])
    padding = Padding.of_mask(mask)
    assert padding.lengths == [2, 3, 2]
    moved = padding.to_the_end(ids)
    assert moved.tolist() == [[1, 2, 0, 0], [3, 4, 5, 0], [6, 7, 0, 0]]
    assert padding.back(moved).tolist() == [[0, 0, 1, 2], [3, 4, 5, 0], [0, 6, 7, 0]]
