"""The held-out loss, with the inference solve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Iterator

import torch
import torch.distributed as dist
from torch import nn

from megatron_implicit.data.sampling import Batch

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
        model: as ``build_model`` returns it; left in the mode it was in.
        batches: this replica's share, finite.
        device: where the model is.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        losses = model(batch["tokens"], None, None, labels=batch["labels"])
        mask, trace = batch["loss_mask"], model.decoder.trace
        sums += torch.tensor(
            [
                float((losses.double() * mask).sum()),
                float(mask.sum()),
                float(trace.evaluations.sum()),
                float((~trace.converged).sum()),
                len(trace.evaluations),
            ],
            dtype=torch.float64,
        )
    model.train(was_training)
    sums = sums.to(device)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    loss, tokens, evaluations, unconverged, sequences = sums.tolist()
    return HeldOutLoss(loss / tokens, int(tokens), evaluations / sequences, unconverged / sequences)
