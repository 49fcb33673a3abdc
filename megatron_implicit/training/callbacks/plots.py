"""Draws the run's curves when a job ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_implicit.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import Trainer


class Plots(Callback):
    """PNG files in the run's plots/ folder, by rank 0; not where the job has to make haste."""

    def on_end(self, trainer: "Trainer") -> None:
        if dist.get_rank() == 0 and trainer.config.telemetry.plots and not trainer.interrupted:
            from megatron_implicit.telemetry.plots import write_plots

            write_plots(trainer.run_dir)
