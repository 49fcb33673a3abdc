"""The held-out loss, with the inference solve."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, Callable, Iterator, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_implicit.comm.sharing import from_last
from megatron_implicit.data.sampling import Batch
from megatron_implicit.solver import SolveTrace

from megatron.core import parallel_state  # isort: skip


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean over held-out tokens of all replicas."""

    loss: float
    """Cross-entropy in nats a token."""
    tokens: int
    """Tokens it was measured on."""
    evaluations: float
    """Mean evaluations of F by sequence."""
    unconverged: float
    """Share of sequences that did not reach the tolerance."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def measure_loss(model: nn.Module, batches: Iterator[Batch], device: torch.device) -> HeldOutLoss:
    """Evaluates this replica's batches and averages over replicas; every rank must call it.

    Args:
        model: as ``build_model`` returns it, on one pipeline stage; left in the mode it was in.
        batches: this replica's share, finite.
        device: where the model is.
    """
    with _evaluating(model):
        sums = torch.zeros(len(_Sums._fields), dtype=torch.float64)
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            losses = model(batch["tokens"], None, None, labels=batch["labels"])
            sums += _sums(losses, batch["loss_mask"], model.decoder.trace)
    return _over_replicas(sums, device)


@torch.no_grad()
def measure_loss_over_stages(
    forward_backward: Callable[..., list[Any]], model: nn.Module, batches: Iterator[Batch], microbatches: int,
    batch_shape: tuple[int, int], device: torch.device,
) -> HeldOutLoss:  # fmt: skip
    """As ``measure_loss``, for a model divided over pipeline stages.

    Args:
        forward_backward: the layout's schedule, of which the forward half is used.
        microbatches: in ``batches``.
        batch_shape: (b, s) of each.
    """

    def forward_step(iterator: Iterator[Batch], stage: Any) -> tuple[Tensor, Any]:
        batch = {name: value.to(device) for name, value in next(iterator).items()}
        losses = stage(batch["tokens"], None, None, labels=batch["labels"])

        def report(losses: Tensor) -> tuple[Tensor, Tensor]:
            return losses.mean(), _sums(losses, batch["loss_mask"], model.decoder.trace)

        return losses, report

    with _evaluating(model):
        reports = forward_backward(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=model,
            num_microbatches=microbatches,
            micro_batch_size=batch_shape[0],
            seq_length=batch_shape[1],
            forward_only=True,
        )
    sums = torch.stack(reports).sum(dim=0) if reports else None
    return _over_replicas(from_last(sums, parallel_state.get_pipeline_model_parallel_group()), device)


class _Sums(NamedTuple):
    loss: float
    tokens: float
    evaluations: float
    unconverged: float
    sequences: float


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _sums(losses: Tensor, mask: Tensor, trace: SolveTrace) -> Tensor:
    """What one microbatch adds: ``_Sums`` as [5] float64 on the host."""
    sums = _Sums(
        loss=float((losses.double() * mask).sum()),
        tokens=float(mask.sum()),
        evaluations=float(trace.evaluations.sum()),
        unconverged=float((~trace.converged).sum()),
        sequences=len(trace.evaluations),
    )
    return torch.tensor(sums, dtype=torch.float64)


def _over_replicas(sums: Tensor, device: torch.device) -> HeldOutLoss:
    sums = sums.to(device)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    total = _Sums(*sums.tolist())
    return HeldOutLoss(
        total.loss / total.tokens,
        int(total.tokens),
        total.evaluations / total.sequences,
        total.unconverged / total.sequences,
    )
