"""The decoders that take the place of ``model.decoder`` in GPTModel and MambaModel.

``FixedPointDecoder`` solves z = F(z; u(e)) for the embedding e it is given; ``SinglePassDecoder`` returns F(e). Both
bind what one microbatch's evaluations share (effective weights, injection, states) explicitly around each evaluation.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_implicit.comm.reductions import ResidualReducer
from megatron_implicit.layers.linear import InjectionLinear
from megatron_implicit.layers.norms import RMSNorm
from megatron_implicit.layers.passes import EffectiveWeight, LayerStates, Pass
from megatron_implicit.layers.stack_config import StackConfig
from megatron_implicit.layers.weights import weight_owners
from megatron_implicit.models.stack_map import StackMap
from megatron_implicit.solver import FixedPointSolve, SolveSettings, SolveTrace, Step, drive
from megatron_implicit.telemetry.timing import switch_to

from megatron.core.transformer.module import MegatronModule  # isort: skip

Weights = dict[nn.Module, EffectiveWeight]


class StackDecoder(MegatronModule):
    """What both decoders share: the map F and the pass it is evaluated under."""

    def __init__(self, config: StackConfig, stack: nn.Module, tp_group: dist.ProcessGroup) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.map = StackMap(config, stack)
        self.trace: Optional[SolveTrace] = None

    @property
    def input_tensor(self) -> Optional[Tensor]:
        """Read by Megatron-Core's rotary embedding to learn the sequence length."""
        return self.map.stack.input_tensor

    @property
    def layers(self) -> nn.ModuleList:
        """Read by Megatron-Core's distributed optimizer and its checkpoints."""
        return self.map.stack.layers

    def set_input_tensor(self, input_tensor: Optional[Tensor]) -> None:
        """Called by Megatron-Core's schedules."""
        self.map.stack.set_input_tensor(input_tensor)

    def begin(self, embedding: Tensor, states: Optional[LayerStates] = None, weights: Optional[Weights] = None) -> Pass:
        """Everything that the evaluations of one microbatch share.

        Args:
            embedding: e, [s or s/t, b, h].
            states: of an inference solve over part of a sequence.
            weights: effective weights of an earlier pass, if the parameters have not changed since.
        """
        if weights is None:
            weights = {owner: owner() for owner in weight_owners(self)}
        return Pass(weights=weights, states=states)

    def evaluate(self, z: Tensor, bound_pass: Pass, rotary_pos_emb: Optional[Tensor] = None) -> Tensor:
        """One pass of F, [s or s/t, b, h] float32."""
        return self.map(z, bound_pass, rotary_pos_emb)


class SinglePassDecoder(StackDecoder):
    """The explicit model: z = F(e), once."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, rotary_pos_emb: Optional[Tensor] = None, **_: Any
    ) -> Tensor:
        """e [s or s/t, b, h] -> z of the same shape, float32."""
        self.trace = SolveTrace.explicit(hidden_states.shape[1])
        return self.evaluate(hidden_states.float(), self.begin(hidden_states), rotary_pos_emb)


class FixedPointDecoder(StackDecoder):
    """The implicit model: z = F(z; u(e)), solved without gradient, then carried by a few passes with gradient.

    ``solver`` is the solve of a training forward pass, ``inference`` the one of eval mode; both may be replaced at
    any time (the curriculum does). ``trace`` holds the statistics of the last solve.
    """

    def __init__(
        self, config: StackConfig, stack: nn.Module, tp_group: dist.ProcessGroup,
        solver: SolveSettings, inference: SolveSettings,
    ) -> None:  # fmt: skip
        super().__init__(config, stack, tp_group)
        self.solver, self.inference = solver, inference
        self.injection_norm = RMSNorm(config, config.hidden_size)
        self.injection = InjectionLinear(config, tp_group)
        self._reduce = ResidualReducer(tp_group, sharded=config.sequence_parallel)

    def begin(self, embedding: Tensor, states: Optional[LayerStates] = None, weights: Optional[Weights] = None) -> Pass:
        """Effective weights, and u = W_inj · RMSNorm(e) + b once for all layers and evaluations."""
        bound_pass = super().begin(embedding, states, weights)
        with bound_pass.bound():
            bound_pass.injection, _ = self.injection(self.injection_norm(embedding))
        return bound_pass

    def start(self, embedding: Tensor, settings: SolveSettings) -> FixedPointSolve:
        """A fresh solve from z0 = 0 for an embedding [s or s/t, b, h]."""
        return FixedPointSolve(settings, torch.zeros_like(embedding, dtype=torch.float32).detach(), self._reduce)

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, rotary_pos_emb: Optional[Tensor] = None, **_: Any
    ) -> Tensor:
        """e [s or s/t, b, h] -> z of the same shape, float32.

        Raises:
            NonFiniteIterateError: the iteration diverged.
        """
        settings = self.solver if self.training else self.inference
        bound_pass = self.begin(hidden_states)
        solve = self.start(hidden_states, settings)
        with torch.set_grad_enabled(torch.is_grad_enabled() and settings.gradient != "none"):
            z = drive(solve, lambda z, step: self._timed(step, z, bound_pass, rotary_pos_emb))
        switch_to("forward")
        self.trace = solve.trace()
        return z

    def _timed(self, step: Step, z: Tensor, bound_pass: Pass, rotary_pos_emb: Optional[Tensor]) -> Tensor:
        """``evaluate``; what the solve does with the result counts as its part of the step too."""
        switch_to("phantom" if step is Step.PHANTOM else "solve")
        return self.evaluate(z, bound_pass, rotary_pos_emb)
