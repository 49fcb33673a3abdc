"""Whole sequences, given at once: logits, hidden states and solver statistics in any mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Sequence

import torch
from torch import Tensor, nn

from megatron_implicit.errors import NonFiniteIterateError
from megatron_implicit.inference.session import SIMULTANEOUS, InferenceSession, SolveMode
from megatron_implicit.models.decoder import FixedPointDecoder
from megatron_implicit.models.language import rotary_angles
from megatron_implicit.solver import SolveTrace, drive


@dataclass(frozen=True)
class ModelOutput:
    """What a call of a loaded model returns."""

    logits: Tensor
    """[b, s, vocab] float32, over the logical vocabulary."""
    hidden: Tensor
    """[b, s, h] float32: the accepted iterate z, which is already normed; 0 at padding."""
    trace: SolveTrace
    """Solver statistics: per sample [b] of a simultaneous solve, per token [b, s] of the others."""


def evaluate(
    model: nn.Module, input_ids: Tensor, mode: SolveMode = SIMULTANEOUS, lengths: Optional[Sequence[int]] = None
) -> ModelOutput:
    """The training forward in training mode (simultaneous, unpadded), the inference solve in eval mode.

    Args:
        model: as ``build_model`` returns it; without sequence parallelism in other modes than simultaneous.
        input_ids: [b, s] int64, padded at the end.
        mode: how many tokens are solved at once.
        lengths: [b] tokens of each sample; None means s.

    Raises:
        NonFiniteIterateError: the iteration diverged.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and model.training):
        if mode != SIMULTANEOUS:
            session = InferenceSession(model, *input_ids.shape)
            solved = session.advance(input_ids, lengths, mode)
            return _output(model, solved.hidden, solved.trace)
        embedding = model.embedding(input_ids, None)
        angles = rotary_angles(model, input_ids.shape[1])
        if lengths is None:
            z, trace = model.decoder(embedding, rotary_pos_emb=angles), model.decoder.trace
            if trace.broken_at is not None and trace.broken_at.any():  # in training mode the solve only records it
                raise NonFiniteIterateError.of(trace.broken_at)
            return _output(model, z, trace)
        return _output(model, *_solve_padded(model, embedding, angles, lengths))


def _solve_padded(
    model: nn.Module, embedding: Tensor, angles: Optional[Tensor], lengths: Sequence[int]
) -> tuple[Tensor, SolveTrace]:
    """Causality keeps padding at the end from the tokens before it; here it is kept out of the residuals too."""
    decoder = model.decoder
    counts = torch.tensor(lengths, device=embedding.device)
    counting = torch.arange(embedding.shape[0], device=embedding.device)[:, None] < counts
    bound_pass = decoder.begin(embedding)
    if isinstance(decoder, FixedPointDecoder):
        solve = decoder.start(embedding, decoder.inference, counting=counting)
        z, trace = drive(solve, lambda z, step: decoder.evaluate(z, bound_pass, angles)), solve.trace()
    else:
        z, trace = decoder.evaluate(embedding.float(), bound_pass, angles), SolveTrace.explicit(embedding.shape[1])
    return z * counting[:, :, None], trace


def logits_of(model: nn.Module, z: Tensor) -> Tensor:
    """z [s or s/t, b, h] -> logits [s, b, vocab] float32, whole on every rank of the tensor group."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    group = model.decoder.tp_group
    logits, _ = model.output_layer(z, weight=model.shared_embedding_or_output_weight())
    if group.size() > 1:
        logits = gather_from_tensor_model_parallel_region(logits, group=group)
    return logits[..., : model.config.vocab_size].float()


def _output(model: nn.Module, z: Tensor, trace: SolveTrace) -> ModelOutput:
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    logits = logits_of(model, z)
    if model.config.sequence_parallel:
        z = gather_from_sequence_parallel_region(z, tensor_parallel_output_grad=False, group=model.decoder.tp_group)
    return ModelOutput(logits.transpose(0, 1), z.transpose(0, 1), trace)
