"""Compares the parameters that several ranks hold: replicas that drift apart train a model that nobody asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_implicit.comm.agreement import first_problem
from megatron_implicit.errors import DesyncError
from megatron_implicit.layers.sharding import placed_parameters
from megatron_implicit.training.callbacks.base import Callback

from megatron.core import parallel_state  # isort: skip

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import StepRecord, Trainer


class Desync(Callback):
    """Every N steps: checksums of all parameters over data-parallel replicas, and over tensor ranks of those that each
    of them holds whole. Runs before a checkpoint is saved.

    Raises:
        DesyncError: names the parameter and the ranks; the job ends and goes on from its last checkpoint.
    """

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        every = trainer.config.health.desync_every
        if not every or record.step % every:
            return
        problem = first_problem(find_desync(trainer.model))
        if problem:
            raise DesyncError(
                f"step {record.step}: {problem}: memory or arithmetic of one of them went wrong; go on from the last "
                "checkpoint, on other machines if it happens again"
            )


def find_desync(model: nn.Module) -> Optional[str]:
    """The first parameter of this rank whose copies differ; None if there is none. Every rank must call it."""
    parameters = dict(model.named_parameters())
    whole = [p.name for p in placed_parameters(model.named_modules()) if p.placement is None]
    for names, group in (
        (list(parameters), parallel_state.get_data_parallel_group(with_context_parallel=True)),
        (whole, parallel_state.get_tensor_model_parallel_group()),
    ):
        problem = _compare([parameters[name] for name in names], names, group)
        if problem:
            return problem
    return None


def _compare(parameters: list[Tensor], names: list[str], group: dist.ProcessGroup) -> Optional[str]:
    if group.size() == 1 or not names:
        return None
    own = torch.stack([checksum(parameter) for parameter in parameters])
    sums = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(sums, own, group=group)
    by_rank = torch.stack(sums)  # [ranks, parameters]
    different = (by_rank != by_rank[0]).any(dim=0).nonzero().flatten().tolist()
    if not different:
        return None
    ranks, values = dist.get_process_group_ranks(group), by_rank[:, different[0]]
    odd = [str(rank) for rank, value in zip(ranks, values) if value != values.mode().values]
    whose = f" (rank {', '.join(odd)} from the others)" if len(ranks) > 2 else ""  # of two, either may be wrong
    return (
        f"{len(different)} of {len(names)} parameters, {names[different[0]]} first, differ between ranks "
        f"{', '.join(map(str, ranks))}{whose}"
    )


def checksum(parameter: Tensor) -> Tensor:
    """The sum of a tensor's bits read as integers: any single change changes it. A scalar int64 on its device."""
    integers = {4: torch.int32, 2: torch.int16, 1: torch.int8, 8: torch.int64}[parameter.element_size()]
    return parameter.detach().contiguous().view(integers).sum(dtype=torch.int64)
