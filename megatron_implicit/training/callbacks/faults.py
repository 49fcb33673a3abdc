"""Faults that tests plant with ``debug.inject``; never there in a real run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_implicit.config.validate import parse_fault
from megatron_implicit.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import Trainer


class Faults(Callback):
    """Before the given step, on the given rank: poisons the injection's first weight, or dies without a word."""

    def __init__(self, inject: str) -> None:
        self._kind, self._step, self._rank = parse_fault(inject)

    def before_step(self, trainer: "Trainer", step: int) -> None:
        if step != self._step or dist.get_rank() != self._rank:
            return
        if self._kind == "crash":
            os._exit(70)
        with torch.no_grad():
            next(trainer.model.decoder.injection.parameters()).fill_(float("nan"))
