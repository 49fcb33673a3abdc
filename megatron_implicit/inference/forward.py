"""Forward passes outside the training loop: a whole sequence at once, or chunk by chunk with passed-on states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_implicit.inference.states import SolveStates
from megatron_implicit.models.decoder import FixedPointDecoder
from megatron_implicit.models.language import rotary_angles
from megatron_implicit.solver import SolveTrace, drive


@dataclass(frozen=True)
class ModelOutput:
    """What a call of a loaded model returns."""

    logits: Tensor
    """[b, s, vocab] float32, over the logical vocabulary."""
    hidden: Tensor
    """[b, s, h] float32: the accepted iterate z, which is already normed."""
    trace: SolveTrace
    """Solver statistics: per sample [b] of a simultaneous solve, per token [b, s] of the others."""


def evaluate_sequence(model: nn.Module, input_ids: Tensor) -> ModelOutput:
    """The whole sequence at once: the training forward in training mode, the inference solve in eval mode.

    Args:
        model: as ``build_model`` returns it.
        input_ids: [b, s] int64.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and model.training):
        embedding = model.embedding(input_ids, None)
        z = model.decoder(embedding, rotary_pos_emb=rotary_angles(model, input_ids.shape[1]))
        return _output(model, z, model.decoder.trace)


@torch.no_grad()
def evaluate_in_chunks(model: nn.Module, input_ids: Tensor, chunk_size: int) -> ModelOutput:
    """Solves ``chunk_size`` tokens at a time; a chunk iterates on frozen states and its accepted pass commits them.

    Args:
        model: as ``build_model`` returns it, without sequence parallelism.
        input_ids: [b, s] int64.
        chunk_size: 1 is the reference's sequential mode.
    """
    states, hidden, traces = SolveStates(), [], []
    decoder, weights = model.decoder, None
    for start in range(0, input_ids.shape[1], chunk_size):
        chunk = input_ids[:, start : start + chunk_size]
        embedding = model.embedding(chunk, None)
        bound_pass = decoder.begin(embedding, states, weights)
        weights = bound_pass.weights
        rotary = rotary_angles(model, chunk.shape[1], start)
        if isinstance(decoder, FixedPointDecoder):
            solve = decoder.start(embedding, decoder.inference)
            hidden.append(drive(solve, lambda z, step: decoder.evaluate(z, bound_pass, rotary)))
            traces.append((chunk.shape[1], solve.trace()))
        else:
            hidden.append(decoder.evaluate(embedding.float(), bound_pass, rotary))
            traces.append((chunk.shape[1], SolveTrace.explicit(chunk.shape[0])))
        states.commit()
    return _output(model, torch.cat(hidden), _trace_by_token(traces))


def _output(model: nn.Module, z: Tensor, trace: SolveTrace) -> ModelOutput:
    from megatron.core.tensor_parallel.mappings import (
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
    )

    group = model.decoder.tp_group
    logits, _ = model.output_layer(z, weight=model.shared_embedding_or_output_weight())
    if group.size() > 1:
        logits = gather_from_tensor_model_parallel_region(logits, group=group)
    if model.config.sequence_parallel:
        z = gather_from_sequence_parallel_region(z, tensor_parallel_output_grad=False, group=group)
    logits = logits[..., : model.config.vocab_size].float()
    return ModelOutput(logits.transpose(0, 1), z.transpose(0, 1), trace)


def _trace_by_token(traces: list[tuple[int, SolveTrace]]) -> SolveTrace:
    """One trace a chunk -> one by token: every token of a chunk has its chunk's statistics."""
    longest = max(trace.residuals.shape[-1] for _, trace in traces)

    def by_token(name: str) -> Tensor:
        return torch.cat([getattr(trace, name)[:, None].expand(-1, tokens) for tokens, trace in traces], dim=1)

    residuals = [
        F.pad(trace.residuals, (0, longest - trace.residuals.shape[-1]), value=float("nan"))[:, None].expand(
            -1, tokens, -1
        )
        for tokens, trace in traces
    ]
    return SolveTrace(
        by_token("iterations"), by_token("evaluations"), torch.cat(residuals, dim=1), by_token("converged")
    )
