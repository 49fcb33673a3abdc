"""How well a model tracks the state of a word problem: its accuracy by position, on words it has not seen."""

from __future__ import annotations

from typing import Any, Optional

import torch

from megatron_implicit.api import PretrainedModel
from megatron_implicit.data.tasks.groups import monoid_named
from megatron_implicit.data.tasks.word_problem import WordProblem

Measured = dict[str, Any]
"""accuracy (share of all positions that are right), by_position [s] shares, words, evaluations (mean passes of F: of a
word in simultaneous, of a token in sequential mode; 1 where there is nothing to solve), and the settings."""


@torch.no_grad()
def measure_accuracy(
    lm: PretrainedModel,
    length: int,
    words: int,
    *,
    mode: str = "simultaneous",
    max_iterations: Optional[int] = None,
    tolerance: Optional[float] = None,
    non_identity_share: Optional[float] = None,
    seed: int = 0,
    batch_size: Optional[int] = None,
) -> Measured:
    """Accuracy on words of the test split of the model's own group.

    Args:
        lm: in eval mode.
        length: elements of a word.
        words: how many.
        mode: simultaneous or sequential.
        max_iterations: of a solve, its output pass included; None takes the configuration's.
        tolerance: of a solve; None takes the configuration's.
        non_identity_share: None takes the one of training.
        seed: of the words.
        batch_size: words at a time; changes nothing but speed. None takes 64, or 256 where single tokens are solved.
    """
    data, device = lm.config.data, next(lm.parameters()).device
    share = data.non_identity_share if non_identity_share is None else non_identity_share
    samples = WordProblem(monoid_named(data.group), share).samples("test", words, length, seed)
    wanted = {"max_iterations": max_iterations, "tolerance": tolerance} if lm.config.implicit else {}
    overrides = {name: value for name, value in wanted.items() if value is not None}
    batch_size = batch_size or (64 if mode == "simultaneous" else 256)
    right, evaluations = torch.zeros(length, dtype=torch.float64), 0.0
    for start in range(0, words, batch_size):
        batch = samples.batch(range(start, min(start + batch_size, words)))
        out = lm(batch["tokens"].to(device), mode=mode, **overrides)
        hits = out.logits.argmax(dim=-1).cpu() == batch["labels"]
        right += hits.sum(dim=0)
        evaluations += out.trace.evaluations.double().mean().item() * len(hits)
    by_position = right / words
    return {
        "accuracy": by_position.mean().item(),
        "by_position": by_position.tolist(),
        "evaluations": evaluations / words,
        "words": words,
        "length": length,
        "mode": mode,
        "non_identity_share": share,
    }
