"""Bytes that autograd keeps, by formula: of a layer and a pass for each token, as the modules in ``layers`` keep them
without compiled kernels (those keep no more). Tests hold them against what torch really saves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_implicit.config import Config
from megatron_implicit.planning.parameters import vocabulary_rows, widths


@dataclass(frozen=True)
class TokenBytes:
    """Bytes for each token of a microbatch, on one rank of a tensor group."""

    layer: float
    """Kept by one layer of a pass with gradient, nothing recomputed."""
    layer_input: float
    """Of a layer's input, all that a recomputed layer keeps; of an iterate z or h too: [s or s/t, b, h] float32."""
    final_norm: float
    """Kept by the final norm of a pass."""
    injection: float
    """u, for the whole life of a microbatch."""
    embedding: float
    """The normalised embedding x, in the parameters' precision."""
    injection_graph: float
    """Kept by the injection and its norm, besides u itself."""
    head: float
    """Kept by head and loss: exp(logits) in float32, and their input."""
    head_working: float
    """On top while they are computed: the logits, and a float32 copy or their gradient."""


def token_bytes(config: Config, tensor: int, sequence: bool) -> TokenBytes:
    """For a tensor group of ``tensor`` ranks, with or without sequence parallelism."""
    element, h = element_bytes(config), config.model.hidden_size
    shared = h / (tensor if sequence else 1)  # width of what sequence parallelism divides
    norm = shared * (4 + element)  # the normed input in float32, and the output that the product after it keeps
    vocabulary = math.ceil(config.model.vocab_size / tensor)
    return TokenBytes(
        layer=_mamba2_layer(config, tensor, 4 * shared + norm)
        if config.architecture == "mamba2"
        else _llama_layer(config, tensor, 4 * shared + norm),
        layer_input=4 * shared,
        final_norm=8 * shared,
        injection=element * widths(config, tensor).injected if config.implicit else 0.0,
        embedding=element * shared,
        injection_graph=4 * shared + norm if config.implicit else 0.0,
        head=4 * vocabulary + element * shared,
        head_working=(element + 4) * max(vocabulary, vocabulary_rows(config, tensor)),
    )


def element_bytes(config: Config) -> int:
    """Bytes of an element of a matrix."""
    return 2 if config.train.precision == "bf16" else 4


def pass_bytes(token: TokenBytes, layers: int, recompute: str, *, last: bool) -> float:
    """Kept by a stage's slice of one pass with gradient, for each token."""
    if recompute == "pass":
        return token.layer_input
    layer = token.layer_input if recompute == "layer" else token.layer
    return layers * layer + (token.final_norm if last else 0.0)


def _mamba2_layer(config: Config, tensor: int, norm: float) -> float:
    """Norm with its input; the convolution's padded input and its sums in float32, its output; dt before and after
    softplus; y, gate, silu(gate), their product and that normed, in float32; out_proj's input.

    In float32 the gate is a part of in_proj's output, which is kept whole; in bfloat16 all that is kept of it is cast.
    """
    at, element, model = widths(config, tensor), element_bytes(config), config.model
    padded = 1 + (model.conv_width - 1) / config.data.sequence_length
    convolution = at.convolved * (4 * padded + 4 + element)
    gate = 4 * (at.injected if element == 4 else at.mixed)
    return norm + convolution + 8 * at.heads + gate + at.mixed * (4 * 4 + element)


def _llama_layer(config: Config, tensor: int, norm: float) -> float:
    """Two norms with their inputs; linear_qkv's output, rotated q and k, attention's output and its logsumexp; fc1's
    output, silu of one half, the other half, their product."""
    at, element = widths(config, tensor), element_bytes(config)
    attention = element * (at.injected + at.mixed + at.keys + at.mixed) + 4 * at.heads
    return 2 * norm + attention + element * 5 * at.ffn
