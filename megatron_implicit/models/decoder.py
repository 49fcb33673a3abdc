"""The decoders that take the place of ``model.decoder`` in GPTModel and MambaModel.

``FixedPointDecoder`` solves z = F(z; u(e)) for the embedding e it is given; ``SinglePassDecoder`` returns F(e). Both
bind what one microbatch's evaluations share (effective weights, injection, states) explicitly around each evaluation.

On a pipeline stage a decoder holds a slice of F. An explicit one passes it on as Megatron-Core's schedules ask; the
parts of an implicit one are driven by the recirculating schedule::

    x = decoder.normed(embedding)                            first stage; x travels with the first pass
    bound_pass = decoder.begin_normed(x, weights=leaves)     every stage computes its own u
    h = decoder.evaluate(h, bound_pass, rotary)              its slice; on the last stage the result is F(z)
    solve = decoder.start(x, decoder.solver)                 last stage; solve.update(F(z)) decides
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
from megatron_implicit.layers.sharding import mark_copies
from megatron_implicit.layers.stack_config import StackConfig, Stage
from megatron_implicit.layers.weights import weight_owners
from megatron_implicit.models.stack_map import StackMap
from megatron_implicit.solver import FixedPointSolve, SolveSettings, SolveTrace, Step, drive
from megatron_implicit.telemetry.timing import switch_to

from megatron.core.transformer.module import MegatronModule  # isort: skip

Weights = dict[nn.Module, EffectiveWeight]


class StackDecoder(MegatronModule):
    """What both decoders share: the map F and the pass it is evaluated under."""

    def __init__(self, config: StackConfig, stack: nn.Module, tp_group: dist.ProcessGroup, stage: Stage) -> None:
        super().__init__(config)
        self.tp_group, self.stage = tp_group, stage
        self.map = StackMap(config, stack, stage)
        self.trace: Optional[SolveTrace] = None
        self.input_tensor: Optional[Tensor] = None
        """What came from the stage before; Megatron-Core's rotary embedding learns the sequence length from it."""

    @property
    def layers(self) -> nn.ModuleList:
        """Read by Megatron-Core's distributed optimizer and its checkpoints."""
        return self.map.stack.layers

    def set_input_tensor(self, input_tensor: Optional[Tensor]) -> None:
        """Called by Megatron-Core's schedules."""
        self.input_tensor = input_tensor

    def begin(self, embedding: Tensor, states: Optional[LayerStates] = None, weights: Optional[Weights] = None) -> Pass:
        """Everything that the evaluations of one microbatch share.

        Args:
            embedding: e, [s or s/t, b, h].
            states: of an inference solve over part of a sequence.
            weights: effective weights of an earlier pass, if the parameters have not changed since.
        """
        return self._begin(states, weights)

    def evaluate(self, z: Tensor, bound_pass: Pass, rotary_pos_emb: Optional[Tensor] = None) -> Tensor:
        """One pass of F, or of this stage's slice of it: [s or s/t, b, h] float32."""
        return self.map(z, bound_pass, rotary_pos_emb)

    def effective_weights(self) -> Weights:
        """Of all projections, with the graph through the weight norm; see LeafWeights for leaves."""
        return {owner: owner() for owner in weight_owners(self)}

    def _begin(self, states: Optional[LayerStates], weights: Optional[Weights]) -> Pass:
        return Pass(weights=self.effective_weights() if weights is None else weights, states=states)


class SinglePassDecoder(StackDecoder):
    """The explicit model: z = F(e), once."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, rotary_pos_emb: Optional[Tensor] = None, **_: Any
    ) -> Tensor:
        """e [s or s/t, b, h] -> z of the same shape, float32; later stages take h from ``set_input_tensor``."""
        if not self.stage.is_first:
            hidden_states = self.input_tensor
        self.trace = SolveTrace.explicit(hidden_states.shape[1])
        return self.evaluate(hidden_states.float(), self.begin(hidden_states), rotary_pos_emb)


class FixedPointDecoder(StackDecoder):
    """The implicit model: z = F(z; u(e)), solved without gradient, then carried by a few passes with gradient.

    ``solver`` is the solve of a training forward pass, ``inference`` the one of eval mode; both may be replaced at
    any time (the curriculum does). ``trace`` holds the statistics of the last solve.
    """

    def __init__(
        self, config: StackConfig, stack: nn.Module, tp_group: dist.ProcessGroup, stage: Stage,
        solver: SolveSettings, inference: SolveSettings,
    ) -> None:  # fmt: skip
        super().__init__(config, stack, tp_group, stage)
        self.solver, self.inference = solver, inference
        self.injection_norm = RMSNorm(config, config.hidden_size) if stage.is_first else None
        self.injection = InjectionLinear(config, tp_group)
        if stage.count > 1:
            mark_copies(self.injection, stage.index)
        self.reduce = ResidualReducer(tp_group, sharded=config.sequence_parallel)

    def begin(self, embedding: Tensor, states: Optional[LayerStates] = None, weights: Optional[Weights] = None) -> Pass:
        """Effective weights, and u = W_inj · RMSNorm(e) + b once for all layers and evaluations."""
        return self.begin_normed(self.normed(embedding), states, weights)

    def normed(self, embedding: Tensor) -> Tensor:
        """x = RMSNorm(e), in the parameters' dtype; on the first stage only."""
        return self.injection_norm(embedding)

    def begin_normed(
        self, x: Tensor, states: Optional[LayerStates] = None, weights: Optional[Weights] = None
    ) -> Pass:
        """As ``begin``, from the normed embedding: u = W_inj · x + b, on every stage from its own copy of W_inj."""
        bound_pass = self._begin(states, weights)
        with bound_pass.bound():
            bound_pass.injection, _ = self.injection(x)
        return bound_pass

    def start(
        self, embedding: Tensor, settings: SolveSettings, *, z0: Optional[Tensor] = None,
        counting: Optional[Tensor] = None,
    ) -> FixedPointSolve:  # fmt: skip
        """A fresh solve for an embedding [s or s/t, b, h].

        Args:
            z0: [s, b, h] float32; None is 0.
            counting: [s, b] bool, False where a token is padding; None counts all.
        """
        if z0 is None:
            z0 = torch.zeros_like(embedding, dtype=torch.float32).detach()
        return FixedPointSolve(settings, z0, self.reduce, counting)

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, rotary_pos_emb: Optional[Tensor] = None, **_: Any
    ) -> Tensor:
        """e [s or s/t, b, h] -> z of the same shape, float32. Not on a stage, which has only a part of F.

        Raises:
            NonFiniteIterateError: the iteration diverged, in eval mode; in training mode the trace tells.
        """
        if self.stage.count > 1:
            raise RuntimeError("a pipeline stage holds a slice of F: the recirculating schedule evaluates it")
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
