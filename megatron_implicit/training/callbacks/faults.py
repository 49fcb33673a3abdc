"""Faults that tests plant with ``debug.inject``; never there in a real run."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_implicit.config.validate import parse_fault
from megatron_implicit.device import current_platform
from megatron_implicit.training.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_implicit.training.trainer import Trainer


SLOW_S = 0.2
"""Seconds that a pass takes longer on a slow rank."""


class Faults(Callback):
    """At the given step, on the given rank, once.

    ======================  ==========================================================================================
    nonfinite_iterate       the injection's first weight becomes NaN, and stays so
    nonfinite_solve         the injection is NaN while the step computes
    nan_gradient            a gradient becomes NaN after the backward pass
    gradient_spike          all gradients become a thousand times as large
    loss_spike              the embedding has the wrong sign and scale while the step computes
    diverging_solve         the gains of the stack are so large while the step computes that F is no contraction
    desync                  a parameter changes a little, and stays so
    hang                    the rank sleeps for ever
    slow                    every pass of F takes longer from then on
    crash                   the rank dies without a word
    ======================  ==========================================================================================
    """

    def __init__(self, inject: str) -> None:
        self._kind, self._step, self._rank = parse_fault(inject)
        self._originals: list[tuple[nn.Parameter, Tensor]] = []
        self._due = True

    def before_step(self, trainer: "Trainer", step: int) -> None:
        if not self._strikes(step):
            return
        model = trainer.model
        if self._kind == "crash":
            os._exit(70)
        if self._kind == "slow":
            trainer.model.decoder.map.register_forward_pre_hook(lambda *_: time.sleep(SLOW_S))
            return
        if self._kind == "hang":
            while True:
                time.sleep(3600)
        current_platform().synchronize()  # a checkpoint of the parameters may still be on its way to the host
        with torch.no_grad():
            if self._kind == "nonfinite_iterate":
                next(model.decoder.injection.parameters()).fill_(float("nan"))
            elif self._kind == "nonfinite_solve":
                self._disturb(model, "injection", float("nan"))
            elif self._kind == "desync":
                model.decoder.map.final_norm.weight[0] *= 1.001
            elif self._kind == "loss_spike":
                self._disturb(model, "word_embeddings", -20.0)
            elif self._kind == "diverging_solve":
                self._disturb(model, "map.stack", 20.0, ending="weight_g")

    def after_backward(self, trainer: "Trainer", step: int) -> None:
        for parameter, original in self._originals:
            parameter.data.copy_(original)
        self._originals.clear()
        if not self._strikes(step):
            return
        self._due = False
        if self._kind == "nan_gradient":
            next(trainer.model.parameters()).main_grad.fill_(float("nan"))
        elif self._kind == "gradient_spike":
            for parameter in trainer.model.parameters():
                parameter.main_grad.mul_(1000.0)

    def _strikes(self, step: int) -> bool:
        return self._due and step == self._step and dist.get_rank() == self._rank

    def _disturb(self, model: nn.Module, part: str, factor: float, ending: str = "") -> None:
        """Scales some parameters until the step's gradients are there."""
        for name, parameter in model.named_parameters():
            if part in name and name.endswith(ending):
                self._originals.append((parameter, parameter.detach().clone()))
                parameter.mul_(factor)
