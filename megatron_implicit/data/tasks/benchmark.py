"""How fast word problems are made on this machine."""

from __future__ import annotations

import time

from megatron_implicit.data.tasks.groups import monoid_named
from megatron_implicit.data.tasks.word_problem import WordProblem


def tokens_per_second(group: str, length: int, batch_size: int, seconds: float) -> float:
    """Tokens, with their labels, that this thread makes a second, as training reads them: batch after batch.

    Args:
        group: name of a group or monoid.
        length: elements of a word.
        batch_size: words of a batch.
        seconds: to measure for.
    """
    samples = WordProblem(monoid_named(group), 0.5).samples("train", 1 << 62, length, seed=1)
    samples.batch(range(batch_size))
    batches, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        samples.batch(range(batches * batch_size, (batches + 1) * batch_size))
        batches += 1
    return batches * batch_size * length / spent
