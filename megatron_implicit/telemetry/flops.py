"""Floating-point operations of a model by token; ``device.peaks`` has what devices could do.

Counted are the matrix products a forward pass must do (a multiply-add is 2): projections, the chunked SSD scan in its
matrix form (arXiv 2405.21060, section 6), attention over the full square as FLOP counters do, and the head. A backward
pass is twice a forward pass. Recomputed activations are not model FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_implicit.config import Config, SolverConfig


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one token in one forward evaluation of each part."""

    stack: float
    """One pass of F."""
    injection: float
    """u, once a microbatch; 0 in explicit models."""
    head: float
    """Logits over the logical vocabulary."""

    def training(self, evaluations: float, gradient_passes: int) -> float:
        """FLOPs of one trained token: ``evaluations`` of F without gradient, ``gradient_passes`` with."""
        return self.stack * (evaluations + 3 * gradient_passes) + 3 * (self.injection + self.head)

    def of_phase(self, solver: SolverConfig, implicit: bool) -> float:
        """FLOPs of one trained token if every solve ran to ``max_iterations``."""
        if not implicit:
            return self.training(0, 1)
        if solver.gradient == "unrolled":
            return self.training(0, solver.max_iterations)
        return self.training(solver.max_iterations, solver.phantom_steps)


def model_flops(config: Config) -> ModelFlops:
    """FLOPs of a resolved configuration with a known vocabulary, at its training sequence length."""
    model, tokens = config.model, config.data.sequence_length
    layer, injected_rows = (_mamba2_layer if config.architecture == "mamba2" else _llama_layer)(config, tokens)
    width = model.hidden_size
    return ModelFlops(
        stack=model.num_layers * layer,
        injection=2 * width * injected_rows if config.implicit else 0.0,
        head=2 * width * model.vocab_size,
    )


def _mamba2_layer(config: Config, tokens: int) -> tuple[float, int]:
    """(FLOPs of a layer, rows of in_proj)."""
    model = config.model
    width, inner = model.hidden_size, model.expand * model.hidden_size
    heads, channels, state = inner // model.head_dim, model.head_dim, model.state_size
    bc = 2 * model.num_groups * state
    rows = 2 * inner + bc + heads
    chunk = min(model.scan_chunk_size, tokens)
    scan = 2 * chunk * state * model.num_groups + heads * (2 * chunk * channels + 4 * state * channels)
    return 2 * width * rows + 2 * model.conv_width * (inner + bc) + scan + 2 * inner * width, rows


def _llama_layer(config: Config, tokens: int) -> tuple[float, int]:
    """(FLOPs of a layer, rows of linear_qkv)."""
    model = config.model
    width = model.hidden_size
    rows = width + 2 * (width // model.num_heads) * model.num_query_groups
    attention = 4 * tokens * width
    return 2 * width * rows + attention + 2 * width * width + 6 * width * model.ffn_size, rows
