"""A model is built on the host and moved to its device afterwards: building needs no collective on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_implicit.layers.weights import ColumnShardedWeight
from tests import traces
from tests.distributed.test_layouts import uneven_config


def row_parallel_gains(family: str, layout: traces.Layout) -> dict[str, Tensor]:
    """The gains of a new model whose squares are spread over the tensor ranks, by module."""
    model = traces.build(layout.apply(uneven_config(family)))
    weights = {name: module for name, module in model.named_modules() if isinstance(module, ColumnShardedWeight)}
    return {name: weight.weight_g.detach().clone() for name, weight in weights.items()}


def gains_without_host_collectives(family: str, meeting: str) -> dict[str, Tensor]:
    """As ``row_parallel_gains``, on groups that like NCCL's take no tensor of the host."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # all have joined the job's own group
    dist.destroy_process_group()
    dist.init_process_group("cuda:gloo", store=dist.FileStore(meeting, world), rank=rank, world_size=world)
    return row_parallel_gains(family, traces.Layout(tensor=2))


@pytest.mark.parametrize("family", ["implicit_llama", "implicit_mamba2"])
def test_building_needs_no_collective_on_the_host(pool, one_process: None, tmp_path: Path, family: str) -> None:
    expected = row_parallel_gains(family, traces.Layout())
    assert expected
    for gains in pool(2).run(gains_without_host_collectives, family, str(tmp_path / "meeting")):
        torch.testing.assert_close(gains, expected, rtol=0, atol=0)
