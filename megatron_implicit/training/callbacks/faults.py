"""Faults that tests plant with ``debug.inject``; never there in a real run."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_implicit.config.validate import parse_fault
from megatron_implicit.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import Trainer


SLOW_S = 0.03
"""Seconds that a pass takes longer on a slow rank."""


class Faults(Callback):
    """Before the given step, on the given rank: poisons the injection's first weight, dies without a
    word, or takes longer for every pass of F from then on."""

    def __init__(self, inject: str) -> None:
        self._kind, self._step, self._rank = parse_fault(inject)

    def before_step(self, trainer: "Trainer", step: int) -> None:
        if step != self._step or dist.get_rank() != self._rank:
            return
        if self._kind == "crash":
            os._exit(70)
        if self._kind == "slow":
            trainer.model.decoder.map.register_forward_pre_hook(lambda *_: time.sleep(SLOW_S))
            return
        with torch.no_grad():
            next(trainer.model.decoder.injection.parameters()).fill_(float("nan"))
