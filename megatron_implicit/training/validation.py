"""The held-out loss, with the inference solve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_implicit.comm.reductions import from_last_stage
from megatron_implicit.data.sampling import Batch, on_device
from megatron_implicit.solver import SolveTrace

from megatron.core import parallel_state  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip


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
def measure_loss(
    model: nn.Module, batches: Iterable[Batch], device: torch.device,
    forward_backward: Optional[Callable[..., list[Any]]] = None, alive: Callable[[str], None] = lambda where: None,
) -> HeldOutLoss:  # fmt: skip
    """Evaluates this replica's batches and averages over replicas; every rank must call it.

    Args:
        model: as ``build_model`` returns it; left in the mode it was in.
        batches: this replica's share, finite and equally large.
        device: where the model is.
        forward_backward: the schedule, of which the forward half is used; None takes Megatron-Core's.
        alive: told of every batch that begins.
    """
    was_training, batches, decoder = model.training, list(batches), model.decoder
    model.eval()

    def forward_step(iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        alive("a batch of the validation")
        batch = on_device(next(iterator), device)
        losses = model(batch["tokens"], None, None, labels=batch["labels"])
        return losses, lambda output: (output.mean(), _sums(output, batch["loss_mask"], decoder.trace))

    size, length = batches[0]["tokens"].shape
    reports = (forward_backward or get_forward_backward_func())(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=size,
        forward_only=True,
    )
    model.train(was_training)
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    if reports:  # on the last pipeline stage
        sums = torch.stack(reports).sum(dim=0)
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    from_last_stage(sums, parallel_state.get_pipeline_model_parallel_group())
    loss, tokens, evaluations, unconverged, sequences = sums.tolist()
    return HeldOutLoss(loss / tokens, int(tokens), evaluations / sequences, unconverged / sequences)


def _sums(losses: Tensor, mask: Tensor, trace: SolveTrace) -> Tensor:
    """Of a microbatch, [5] float64: losses, tokens, evaluations, unconverged sequences, sequences."""
    counts = (trace.evaluations.sum(), (~trace.converged).sum(), torch.tensor(len(trace.evaluations)))
    sums = ((losses.double() * mask).sum(), mask.sum(), *counts)
    return torch.stack([value.to(losses.device, torch.float64) for value in sums])
