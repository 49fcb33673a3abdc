"""Measures how strongly F contracts while it is trained: the spectral radius of dF/dz at fixed points."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_implicit.errors import NonFiniteIterateError
from megatron_implicit.models.language import rotary_angles
from megatron_implicit.solver import SolveSettings, drive
from megatron_implicit.solver.spectrum import spectral_radius
from megatron_implicit.training.callbacks.base import Callback

from megatron.core import parallel_state  # isort: skip

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import StepRecord, Trainer

ITERATIONS = 32
"""Products with the transposed Jacobian of one measurement: each costs about as much as the backward pass of one F."""


class SpectralRadius(Callback):
    """Every ``telemetry.spectral_radius_every`` steps: on the first microbatch of the step, after its update.

    Fills ``spectral_radius`` of ``record.metrics``: the mean over samples of all replicas, or None where an iterate was
    not finite. Runs between what makes the metrics and what reports them; draws no random number of the run's.
    """

    def after_step(self, trainer: "Trainer", record: "StepRecord") -> None:
        every = trainer.config.telemetry.spectral_radius_every
        if not every or record.step % every:
            return
        before = trainer.state.consumed_samples - trainer.config.train.global_batch_size
        tokens = next(trainer.data.training_batches(before))["tokens"].to(trainer.device)
        settings = SolveSettings.inference(trainer.config.inference)
        trainer.progress.alive(f"the spectral radius after step {record.step}")
        radii = torch.zeros(2, dtype=torch.float64, device=trainer.device)
        try:
            found = radii_at_fixed_points(trainer.model, tokens, settings)
            radii += torch.stack((found.double().sum(), found.new_tensor(len(found)).double()))
        except NonFiniteIterateError:
            pass  # on all ranks of this replica; the others' numbers count
        dist.all_reduce(radii, group=parallel_state.get_data_parallel_group())
        total, samples = radii.tolist()
        record.metrics["spectral_radius"] = total / samples if samples else None


def radii_at_fixed_points(
    model: nn.Module, tokens: Tensor, settings: SolveSettings, iterations: int = ITERATIONS
) -> Tensor:
    """Estimates by sample, [b]; all ranks that share the model must call it, and get the same numbers.

    Args:
        model: implicit, whole (not a pipeline stage).
        tokens: [b, s].
        settings: of the solve that finds the fixed points.

    Raises:
        NonFiniteIterateError: the solve diverged.
    """
    decoder = model.decoder
    with torch.no_grad():
        embedding, angles = model.embedding(tokens, None), rotary_angles(model, tokens.shape[1])
        bound_pass = decoder.begin(embedding)
        z = drive(decoder.start(embedding, settings), lambda z, step: decoder.evaluate(z, bound_pass, angles))
    return spectral_radius(
        lambda z: decoder.evaluate(z, bound_pass, angles), z, iterations=iterations, reduce=decoder.reduce
    )
