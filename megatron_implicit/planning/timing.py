"""Seconds by formula: a stage's tasks, collectives, messages and the optimizer, on a cluster with what it reaches."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_implicit.config import Config, SolverConfig
from megatron_implicit.planning.activations import TokenBytes, element_bytes, token_bytes
from megatron_implicit.planning.cluster import Cluster
from megatron_implicit.planning.layouts import Layout
from megatron_implicit.planning.parameters import injection_parameters, layer_parameters, stage_parameters
from megatron_implicit.schedules.costs import Link, LinkCosts, StageCosts
from megatron_implicit.telemetry.flops import ModelFlops, model_flops


@dataclass(frozen=True)
class Timing:
    """Seconds of everything that a layout does, for one microbatch or one step.

    Args:
        config: resolved, with a known vocabulary.
        layout: the division.
        cluster: the machines.
    """

    config: Config
    layout: Layout
    cluster: Cluster

    # ---------------------------------------------------------------- building blocks

    @property
    def tokens(self) -> int:
        """Of a microbatch."""
        return self.layout.micro_batch_size * self.config.data.sequence_length

    @property
    def token(self) -> TokenBytes:
        """Bytes kept for each token."""
        return token_bytes(self.config, self.layout.tensor, self.layout.sequence)

    @property
    def flops(self) -> ModelFlops:
        """FLOPs of a token."""
        return model_flops(self.config)

    def product(self, flops_per_token: float) -> float:
        """Matrix products of a microbatch, divided over the tensor group: FLOPs / (t x peak x efficiency)."""
        rate = self.cluster.peak * self.cluster.assumed.compute_efficiency
        return flops_per_token * self.tokens / (self.layout.tensor * rate)

    def traffic(self, nbytes: float) -> float:
        """Moving bytes through the device's memory: bytes / (bandwidth x efficiency)."""
        return nbytes / (self.cluster.memory_bandwidth * self.cluster.assumed.memory_efficiency)

    def tensor_collective(self, nbytes: float, rounds: int) -> float:
        """``rounds`` times half an all-reduce of ``nbytes`` in the tensor group: (t-1)/t bytes over a link inside the
        node, t - 1 hops. An all-reduce has two rounds, a gather or a reduce-scatter one."""
        others = self.layout.tensor - 1
        rate = self.cluster.inside * self.cluster.assumed.link_efficiency
        return rounds * (others / self.layout.tensor * nbytes / rate + others * self.cluster.latency_inside)

    # ---------------------------------------------------------------- one layer of a microbatch

    @property
    def layer(self) -> float:
        """A forward pass: its products, its weights read once, every byte it would keep written and read, overhead."""
        flops = self.flops.stack / self.config.model.num_layers
        weights = layer_parameters(self.config, self.layout.tensor).stored_bytes(element_bytes(self.config))
        moved = self.traffic(weights + 2 * self.token.layer * self.tokens)
        return self.product(flops) + moved + self.cluster.assumed.layer_overhead

    @property
    def layer_collectives(self) -> float:
        """An all-reduce [s, b, h] for every output projection; under sequence parallelism a gather and a scatter."""
        return self.projections * self.tensor_collective(self.hidden, 2) + self.gated_norm

    @property
    def layer_backward_collectives(self) -> float:
        """The same for the inputs' gradients; under sequence parallelism the input is gathered once more."""
        rounds = 3 if self.layout.sequence else 2
        return self.projections * self.tensor_collective(self.hidden, rounds) + self.gated_norm

    @property
    def gated_norm(self) -> float:
        """Mamba2's one group spans the tensor group: sums of squares [b, s, 1] float32 are all-reduced."""
        spans = self.config.architecture == "mamba2" and self.config.model.num_groups < self.layout.tensor
        return self.tensor_collective(4 * self.tokens, 2) if spans else 0.0

    @property
    def projections(self) -> int:
        """Output projections of a layer: the mixer's, and an MLP's."""
        return 1 if self.config.architecture == "mamba2" else 2

    @property
    def hidden(self) -> float:
        """Bytes of [s, b, h] in the parameters' precision."""
        return element_bytes(self.config) * self.config.model.hidden_size * self.tokens

    # ---------------------------------------------------------------- the tasks of a stage

    def stage(self, layers: int, solver: SolverConfig, *, first: bool, last: bool) -> StageCosts:
        """Seconds of the tasks of a stage with ``layers`` layers, in a phase."""
        forward = layers * (self.layer + self.layer_collectives)
        backward = layers * (2 * self.layer + self.layer_backward_collectives)
        if self.layout.recompute != "none":
            backward += forward
        injection = self.product(self.flops.injection) + self.traffic(2 * self.token.injection * self.tokens)
        if self.config.implicit and self.layout.sequence:
            injection += self.tensor_collective(self.hidden, 1)
        embedding = self.tensor_collective(self.hidden, 2) if first else 0.0
        return StageCosts(
            solve=forward,
            phantom=forward,
            backward=backward,
            admission=injection + embedding,
            admission_backward=2 * injection,
            judge=self.judge(solver) if last else 0.0,
            head=self.head() if last else 0.0,
        )

    def head(self) -> float:
        """Logits and loss, and their backward pass, twice the work; the softmax all-reduces three numbers a token, the
        backward pass the gradient of its input."""
        logits = 2 * (self.token.head + self.token.head_working) * self.tokens
        forward = self.product(self.flops.head) + self.traffic(logits)
        return 3 * forward + 3 * self.tensor_collective(4 * self.tokens, 2) + self.tensor_collective(self.hidden, 2)

    def judge(self, solver: SolverConfig) -> float:
        """Final norm, residual, best iterate: ten times an iterate's bytes; the host's answer where one is waited for;
        under sequence parallelism the two sums of squares are all-reduced."""
        seconds = self.traffic(10 * self.token.layer_input * self.tokens)
        if not self.config.implicit:
            return seconds
        if solver.tolerance > 0:
            seconds += self.cluster.assumed.decision
        return seconds + (self.tensor_collective(8, 2) if self.layout.sequence else 0.0)

    def weights(self, layers: int) -> float:
        """Weight norm, forwards and backwards: v read twice and W written, then v, dW and their products."""
        if not self.config.implicit:
            return 0.0
        normed = layer_parameters(self.config, self.layout.tensor) * layers
        normed += injection_parameters(self.config, self.layout.tensor)
        return self.traffic(8 * element_bytes(self.config) * normed.matrices)

    # ---------------------------------------------------------------- between stages, between replicas

    def links(self) -> LinkCosts:
        """An iterate [s or s/t, b, h] float32 for each message; neighbours p and p + 1 are t x d ranks apart."""
        stride, stages = self.layout.tensor * self.layout.data, self.layout.pipeline
        efficiency = self.cluster.assumed.link_efficiency
        inside = Link(self.cluster.latency_inside, self.cluster.inside * efficiency)
        between = Link(self.cluster.latency_between, self.cluster.between * efficiency)
        pairs = {}
        for stage in range(stages):
            after = (stage + 1) % stages
            here, there = (number * stride // self.cluster.devices for number in (stage, after))
            pairs[stage, after] = pairs[after, stage] = inside if here == there else between
        return LinkCosts(between, pairs, self.token.layer_input * self.tokens)

    def gradients(self, layers: int, *, first: bool, last: bool) -> float:
        """Between replicas: float32 gradients reduced, and scattered where the optimizer is sharded, whose parameters
        are then gathered: (d-1)/d bytes a round. Not overlapped with the passes."""
        parameters = stage_parameters(self.config, self.layout.tensor, layers, first=first, last=last)
        replicas, sharded = self.layout.data, self.config.parallel.distributed_optimizer
        rounds = 4 * parameters.total * (1 if sharded else 2)
        if sharded:
            rounds += parameters.stored_bytes(element_bytes(self.config))
        inside = self.layout.tensor * replicas <= self.cluster.devices
        rate = (self.cluster.inside if inside else self.cluster.between) * self.cluster.assumed.link_efficiency
        latency = self.cluster.latency_inside if inside else self.cluster.latency_between
        return (replicas - 1) / replicas * rounds / rate + 2 * (replicas - 1) * latency

    def optimizer(self, layers: int, *, first: bool, last: bool) -> float:
        """AdamW on this rank's share: gradient read; main copy and both moments read and written; parameter written.
        Before it, all gradients are zeroed and their norm taken."""
        parameters = stage_parameters(self.config, self.layout.tensor, layers, first=first, last=last)
        share = self.layout.data if self.config.parallel.distributed_optimizer else 1
        update = (4 + 3 * 8 + element_bytes(self.config)) * parameters.total / share
        return self.traffic(update + 8 * parameters.total)
