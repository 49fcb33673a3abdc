"""What a stage keeps for backward passes: graphs of its own layers for the microbatches that have credit, no more."""

from __future__ import annotations

import contextlib
from typing import Iterator

import pytest
import torch
from torch import Tensor

from megatron_implicit.comm.ring import ring_of_layout
from megatron_implicit.config import config_from_dict, config_to_dict
from megatron_implicit.schedules import Limits
from megatron_implicit.schedules.recirculating import RecirculatingSchedule
from megatron_implicit.training.step import StepRunner
from tests import goldens, traces

MICROBATCHES = 6


class SavedBytes:
    """Bytes that autograd keeps alive at once, each storage once, the model's own left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._uses: dict[int, int] = {}
        self.now = self.peak = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator["SavedBytes"]:
        """Counts what is saved inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor):
            yield self

    def add(self, storage: torch.UntypedStorage, sign: int) -> None:
        """One use more or less of a storage."""
        key = storage.data_ptr()
        if key in self._own:
            return
        before = self._uses.get(key, 0)
        self._uses[key] = before + sign
        if before == 0 or self._uses[key] == 0:
            self.now += sign * storage.nbytes()
            self.peak = max(self.peak, self.now)


class _Kept:
    def __init__(self, count: SavedBytes, tensor: Tensor) -> None:
        self.count, self.tensor = count, tensor
        count.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.count.add(self.tensor.untyped_storage(), -1)


def peak_bytes(family: str, evaluations: int, passes: int, limits: Limits, microbatches: int = MICROBATCHES) -> int:
    """The most this stage keeps in a step."""
    values = config_to_dict(traces.Layout(pipeline=2).apply(goldens.golden_config(family)))
    values["train"] |= {"steps": 4, "tokens": None, "global_batch_size": microbatches, "micro_batch_size": 1}
    values["solver"] |= {"max_iterations": evaluations, "tolerance": 0.0, "phantom_steps": passes}
    values["curriculum"] = []
    values["data"]["sequence_length"] = 32
    config = config_from_dict(values)
    parts = traces.prepare(config, None)
    runner = StepRunner(config, parts)
    runner.forward_backward = RecirculatingSchedule(ring_of_layout(1.0, host_payloads=True), limits)
    tokens = torch.randint(0, config.model.vocab_size, (microbatches, 33), generator=torch.Generator().manual_seed(1))
    saved = SavedBytes(parts.model)
    with saved.counting():
        runner.run(1, traces.microbatches(config, tokens), torch.device("cpu"))
    return saved.peak


def peaks(family: str) -> dict[str, int]:
    """By what is varied."""
    alone = Limits(1, 1, 1)
    return {
        "x and u": travelling_bytes(family),
        "one pass": peak_bytes(family, 2, 1, alone, microbatches=1),
        "two passes": peak_bytes(family, 2, 2, alone, microbatches=1),
        "few evaluations": peak_bytes(family, 2, 2, alone),
        "many evaluations": peak_bytes(family, 30, 2, alone),
        "more in flight": peak_bytes(family, 6, 2, Limits(4, 2, 1)),
    }


def travelling_bytes(family: str) -> int:
    """Of x and u of a microbatch of 32 tokens."""
    model = traces.build(traces.Layout(pipeline=2).apply(goldens.golden_config(family)))
    width = model.config.hidden_size
    with torch.no_grad():
        u = model.decoder.begin_normed(torch.zeros(32, 1, width)).injection
    return 4 * 32 * (width + u.shape[-1])


@pytest.mark.parametrize("family", goldens.IMPLICIT)
def test_a_stage_keeps_the_graphs_that_have_credit(pool, family: str) -> None:
    """G·k graphs of its layers, x and u of W + G microbatches, and the weights' own once; no evaluation adds to it."""
    for measured in pool(2).run(peaks, family):
        travelling, graph = measured["x and u"], measured["two passes"] - measured["one pass"]
        own = measured["one pass"] - graph
        assert graph > 4 * travelling > 0
        for evaluations in ("few", "many"):  # at W = G = 1
            assert 0 <= measured[f"{evaluations} evaluations"] - (own + 2 * graph) <= travelling
        assert measured["more in flight"] <= own + 4 * graph + 5 * travelling  # at W = 4, G = 2
