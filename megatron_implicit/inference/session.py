"""The state-passing primitive: the next tokens of a batch are solved on committed states, then committed themselves.

Simultaneous, sequential, chunked and window solves, and generation, are all calls of one session.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Literal, Optional, Sequence

import torch
from torch import Tensor, nn

from megatron_implicit.errors import ConfigError
from megatron_implicit.inference.states import SolveStates
from megatron_implicit.inference.trace import merge_by_token
from megatron_implicit.layers.passes import Pass
from megatron_implicit.models.decoder import FixedPointDecoder
from megatron_implicit.models.language import rotary_angles
from megatron_implicit.solver import SolveSettings, SolveTrace, drive

Mode = Literal["simultaneous", "sequential", "chunked", "window"]


@dataclass(frozen=True)
class SolveMode:
    """How many tokens are solved at once."""

    chunk: Optional[int] = None
    """Tokens of a chunk; None: all that are given."""
    window: Optional[int] = None
    """Tokens of the sliding window; None: chunks."""

    @classmethod
    def named(cls, mode: Mode, chunk_size: Optional[int] = None, window_size: Optional[int] = None) -> "SolveMode":
        """The mode with this name.

        Raises:
            ConfigError: an unknown name, or a size that is missing, impossible or not of this mode.
        """
        if mode not in ("simultaneous", "sequential", "chunked", "window"):
            raise ConfigError(f"mode={mode!r} is unknown: use simultaneous, sequential, chunked or window")
        for name, size, owner in (("chunk_size", chunk_size, "chunked"), ("window_size", window_size, "window")):
            if mode == owner and (not size or size < 1):
                raise ConfigError(f"{name}={size} must be a positive number of tokens in {owner} mode")
            if mode != owner and size is not None:
                raise ConfigError(f"{name}={size} is for mode={owner!r}, not {mode!r}: drop it or change the mode")
        return cls(chunk=1 if mode == "sequential" else chunk_size, window=window_size)


SIMULTANEOUS = SolveMode()


@dataclass(frozen=True)
class Solved:
    """Tokens whose iterate has been accepted."""

    hidden: Tensor
    """[s, b, h] float32, the accepted z; 0 at padding."""
    trace: SolveTrace
    """By sample [b] of a simultaneous solve, by token [b, s] of the others."""
    last: Tensor
    """[b, h] z of each sample's last token; of an earlier segment where it had none in this one."""


class InferenceSession:
    """A batch of sequences that grow: what has been solved is kept as states, effective weights are computed once.

    Every sample is solved as if it were alone. The model's parameters must not change while a session lives.

    Args:
        model: as ``build_model`` returns it, on the CPU or GPU, without sequence parallelism.
        batch: samples.
        capacity: most tokens of a sample that attention's caches hold; ignored by Mamba2, whose states do not grow.
        settings: of the inference solve; None takes the model's. Unused by explicit models.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, batch: int, capacity: Optional[int], settings: Optional[SolveSettings] = None
    ) -> None:
        self.model, self.decoder = model, model.decoder
        self.implicit = isinstance(self.decoder, FixedPointDecoder)
        self.settings = settings or (self.decoder.inference if self.implicit else None)
        self.device = next(model.parameters()).device
        has_attention = getattr(model, "rotary_pos_emb", None) is not None
        if has_attention and (capacity is None or capacity < 1):
            raise ConfigError(f"capacity={capacity} must be a number of tokens: attention keeps them in a cache")
        self.capacity = capacity if has_attention else None
        """Most tokens of a sample; None where there is no limit."""
        self.states = SolveStates(batch, self.capacity, self.device)
        self._weights = self.decoder.effective_weights()
        self._last = torch.zeros(batch, model.config.hidden_size, device=self.device)
        self._angles = rotary_angles(model, capacity + 1) if has_attention else None

    @property
    def positions(self) -> list[int]:
        """Committed tokens by sample."""
        return self.states.positions

    @torch.no_grad()
    def advance(
        self, input_ids: Tensor, lengths: Optional[Sequence[int]] = None, mode: SolveMode = SIMULTANEOUS
    ) -> Solved:
        """Solves the next tokens of every sample and commits them.

        Args:
            input_ids: [b, s] int64; where ``lengths`` are given, padded at the end with any valid id.
            lengths: [b] tokens of each sample, from 0 to s; None means s.
            mode: how many are solved at once.

        Raises:
            CapacityError: the caches do not hold them.
            NonFiniteIterateError: the iteration diverged.
        """
        tokens = input_ids.shape[1]
        lengths = None if lengths is None or min(lengths) == tokens else list(lengths)
        nothing = lengths is not None and not any(lengths)  # a window slides on the tokens it accepts
        if mode.window is not None and self.implicit and not nothing:
            from megatron_implicit.inference.window import solve_in_window

            return solve_in_window(self, input_ids, lengths, min(mode.window, tokens))
        chunk = min(mode.window or mode.chunk or tokens, tokens)
        if chunk == tokens and mode == SIMULTANEOUS:
            return self._solve(input_ids, lengths)
        return self._solve_in_chunks(input_ids, lengths, chunk)

    def keep(self, samples: Sequence[int]) -> None:
        """Goes on with these samples only."""
        self.states.keep(samples)
        self._last = self._last[list(samples)]

    # ---------------------------------------------------------------- parts of a solve

    def embed(self, input_ids: Tensor) -> tuple[Tensor, Pass]:
        """e [s, b, h] of tokens [b, s], and the pass with its injection."""
        embedding = self.model.embedding(input_ids, None)
        return embedding, self.decoder.begin(embedding, self.states, self._weights)

    def bind(self, bound_pass: Pass, tokens: int, lengths: Optional[Sequence[int]]) -> Callable[[Tensor], Tensor]:
        """F over the ``tokens`` after the committed ones, whose injection the pass holds: z [s, b, h] -> F(z)."""
        self.states.begin(tokens, lengths)
        rotary = self._rotary(tokens)
        return lambda z: self.decoder.evaluate(z, bound_pass, rotary)

    def accept(self, hidden: Tensor) -> None:
        """Commits what the last evaluation proposed; ``hidden`` [s, b, h] is its result."""
        lengths = self.states.lengths
        if lengths is None:
            self._last = hidden[-1]
        else:
            index = (lengths - 1).clamp(min=0)[None, :, None].expand(1, -1, hidden.shape[-1])
            self._last = torch.where((lengths > 0)[:, None], hidden.gather(0, index)[0], self._last)
        self.states.commit()

    @property
    def last(self) -> Tensor:
        """[b, h] z of each sample's last committed token."""
        return self._last

    def _solve(self, input_ids: Tensor, lengths: Optional[Sequence[int]]) -> Solved:
        embedding, bound_pass = self.embed(input_ids)
        evaluate = self.bind(bound_pass, input_ids.shape[1], lengths)
        counting = self.states.counting.T if self.states.counting is not None else None
        if self.implicit:
            z0 = self._last.expand(embedding.shape) if self.settings.warm_start else None
            solve = self.decoder.start(embedding, self.settings, z0=z0, counting=counting)
            hidden = drive(solve, lambda z, step: evaluate(z))
            trace = solve.trace()
        else:
            hidden, trace = evaluate(embedding.float()), SolveTrace.explicit(embedding.shape[1])
        self.accept(hidden)
        if counting is not None:
            hidden = hidden * counting[:, :, None]
        return Solved(hidden, trace, self._last)

    def _solve_in_chunks(self, input_ids: Tensor, lengths: Optional[list[int]], chunk: int) -> Solved:
        hidden, traces = [], []
        for start in range(0, input_ids.shape[1], chunk):
            part = input_ids[:, start : start + chunk]
            tokens = part.shape[1]
            here = None if lengths is None else [min(max(length - start, 0), tokens) for length in lengths]
            solved = self._solve(part, here)
            hidden.append(solved.hidden)
            traces.append((tokens, solved.trace))
        return Solved(torch.cat(hidden), merge_by_token(traces, lengths), self._last)

    def _rotary(self, tokens: int) -> Optional[Tensor]:
        """Angles of the segment's positions, [s, 1 or b, 1, d]; None for models without rotary embedding."""
        if self._angles is None:
            return None
        if self.states.start is not None:
            return self._angles[self.states.start : self.states.start + tokens]
        places = self.states.places.clamp(max=len(self._angles) - 1)
        return self._angles[:, 0][places.T]
