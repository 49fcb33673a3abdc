"""The schedule of the learning rate."""

from __future__ import annotations

from tests import traces
from tests.distributed.test_layouts import uneven_config


def test_a_rate_below_the_lowest_is_not_raised_by_the_decay(one_process: None) -> None:
    config = uneven_config("explicit_llama")
    config.optimizer.learning_rate, config.schedule.min_learning_rate = 1e-6, 1e-5
    config.schedule.warmup_fraction, config.schedule.decay_fraction = 0.0, 0.5
    parts, rates = traces.prepare(config, None), set()
    for _ in range(config.train.steps):
        rates.add(parts.optimizer.param_groups[0]["lr"])
        parts.scheduler.step(1)
    assert rates == {1e-6}
