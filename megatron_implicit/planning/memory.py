"""Bytes of a rank by formula: what a stage of a layout holds at its peak in a phase."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_implicit.config import Config, SolverConfig
from megatron_implicit.planning.activations import element_bytes, pass_bytes, token_bytes
from megatron_implicit.planning.layouts import Layout
from megatron_implicit.planning.parameters import injection_parameters, layer_parameters, stage_parameters


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: float
    gradients: float
    """float32, of every parameter."""
    optimizer: float
    """AdamW's two moments and, in bf16, the matrices' float32 main copies; divided over the replicas if sharded."""
    weights: float
    """Effective weights of weight norm and their gradients; 0 in explicit models."""
    graphs: float
    """Kept for the backward passes of passes with gradient."""
    in_flight: float
    """Iterates, embeddings and injections of the microbatches in flight, and the head's logits."""
    working: float
    """The largest layer's temporaries, recomputed activations, logits being computed."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


def gradient_passes(config: Config, solver: SolverConfig) -> int:
    """k: passes with gradient of a microbatch."""
    if not config.implicit:
        return 1
    return solver.max_iterations if solver.gradient == "unrolled" else solver.phantom_steps


def stage_memory(config: Config, layout: Layout, layers: tuple[int, ...], solver: SolverConfig, stage: int) -> Memory:
    """Of a rank of one stage, in one phase."""
    first, last = stage == 0, stage == layout.pipeline - 1
    parameters = stage_parameters(config, layout.tensor, layers[stage], first=first, last=last)
    element = element_bytes(config)
    sharded = layout.data if config.parallel.distributed_optimizer else 1
    main = 4 * parameters.matrices if element == 2 else 0
    activations = (_pipelined if layout.pipeline > 1 else _local)(config, layout, layers[stage], solver, first, last)
    return Memory(
        parameters=parameters.stored_bytes(element),
        gradients=4 * parameters.total,
        optimizer=(8 * parameters.total + main) / sharded,
        weights=_effective_weights(config, layout, layers[stage]),
        **activations,
    )


def peak_memory(config: Config, layout: Layout, layers: tuple[int, ...], solver: SolverConfig) -> Memory:
    """Of the stage that needs most."""
    stages = (stage_memory(config, layout, layers, solver, stage) for stage in range(layout.pipeline))
    return max(stages, key=lambda memory: memory.total)


def _effective_weights(config: Config, layout: Layout, layers: int) -> float:
    """Once a microbatch, with gradients in the same precision; on a pipeline once a step, with float32 sums."""
    if not config.implicit:
        return 0.0
    normed = (layer_parameters(config, layout.tensor) * layers + injection_parameters(config, layout.tensor)).matrices
    element = element_bytes(config)
    return normed * (element + (4 if layout.pipeline > 1 else element))


def _local(config: Config, layout: Layout, layers: int, solver: SolverConfig, first: bool, last: bool) -> dict:
    """One microbatch after the other: k graphs; u, its graph and gradient; the solve's z, F(z) and best; the head."""
    token = token_bytes(config, layout.tensor, layout.sequence)
    tokens = layout.micro_batch_size * config.data.sequence_length
    iterates = 3 if config.implicit else 1
    return {
        "graphs": tokens * gradient_passes(config, solver) * pass_bytes(token, layers, layout.recompute, last=True),
        "in_flight": tokens
        * (2 * token.injection + token.injection_graph + iterates * token.layer_input + token.head),
        "working": tokens * (_recomputed(token, layout, layers) + token.head_working),
    }


def _pipelined(config: Config, layout: Layout, layers: int, solver: SolverConfig, first: bool, last: bool) -> dict:
    """The recirculating schedule: x and u for the W + G microbatches in flight, G·k graphs with what they gave, du for
    G; what was sent last of each microbatch in both directions. The judge has z, best and F(z) for W, z after each pass
    with gradient and the loss's gradient for G, one head at a time; stage 0 the embedding's graph and parked z.
    1F1B: graphs of up to P microbatches."""
    token = token_bytes(config, layout.tensor, layout.sequence)
    tokens = layout.micro_batch_size * config.data.sequence_length
    one_pass = pass_bytes(token, layers, layout.recompute, last=last)
    working = _recomputed(token, layout, layers) + (token.head_working if last else 0.0)
    if layout.limits is None:
        return {
            "graphs": tokens * layout.pipeline * one_pass,
            "in_flight": tokens * (4 * token.layer_input + (token.head if last else 0.0)),
            "working": tokens * working,
        }
    limits, k = layout.limits, gradient_passes(config, solver)
    flying = limits.in_flight * (token.embedding + token.injection) + limits.graphs * token.injection
    iterates = limits.in_flight + limits.graphs + k * limits.graphs
    if first:
        flying += limits.in_flight * token.injection_graph
        iterates += limits.in_flight
    if last:
        iterates += 3 * limits.solving + (k + 1) * limits.graphs
        working += token.head
    flying += iterates * token.layer_input
    return {"graphs": tokens * limits.graphs * k * one_pass, "in_flight": tokens * flying, "working": tokens * working}


def _recomputed(token, layout: Layout, layers: int) -> float:
    """A layer's temporaries, which are at most what it keeps; on top what a backward pass recomputes at once."""
    return token.layer * {"none": 1, "layer": 2, "pass": 1 + layers}[layout.recompute]
