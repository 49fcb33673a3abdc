"""Where a step's time goes: parts add up, and waiting for others is told from working."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from megatron_implicit.device.collectives import observe_collectives
from megatron_implicit.telemetry.timing import PARTS, StepClock, switch_to, timed_as


def test_parts_add_up_to_the_step() -> None:
    clock = StepClock()
    began = time.perf_counter()
    with clock.step():
        switch_to("solve")
        time.sleep(0.02)
        with timed_as("communication"):
            time.sleep(0.03)
        time.sleep(0.01)
        switch_to("backward")
    elapsed = time.perf_counter() - began
    seconds = clock.times.seconds()
    assert set(seconds) == {*PARTS, "step"}
    assert seconds["solve"] >= 0.03 and seconds["communication"] >= 0.03
    assert 0.06 <= seconds["step"] <= elapsed
    assert sum(seconds[part] for part in PARTS) == pytest.approx(seconds["step"])


def test_outside_a_step_nothing_is_timed() -> None:
    clock = StepClock()
    with clock.step():
        pass
    switch_to("solve")
    time.sleep(0.01)
    assert clock.times.seconds()["solve"] == 0


def test_a_failed_step_stops_the_clock() -> None:
    clock = StepClock()
    with pytest.raises(ValueError), clock.step():
        raise ValueError
    assert switch_to("solve") == "solve"


def _one_rank_is_slow() -> dict[str, float]:
    import megatron.core.tensor_parallel.mappings  # noqa: F401  (its own names of collectives are found too)

    observe_collectives(lambda: timed_as("communication"))
    clock = StepClock()
    dist.barrier()  # a rank may have got its job later than the other
    with clock.step():
        switch_to("solve")
        time.sleep(1.0 if dist.get_rank() else 0.0)
        dist.all_reduce(torch.ones(8))
        switch_to("optimizer")
    return clock.times.seconds()


def test_the_rank_that_others_wait_for_is_the_one_that_does_not_wait(pool) -> None:
    fast, slow = pool(2).run(_one_rank_is_slow)
    assert fast["communication"] > slow["communication"]
    assert slow["solve"] >= 1.0 and slow["solve"] > fast["solve"]
