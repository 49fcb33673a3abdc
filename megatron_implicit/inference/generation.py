"""Going on from prompts, token by token: each token is solved on the states of those before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Collection, Iterator, Literal, Optional, Sequence

import torch
from torch import Tensor

from megatron_implicit.errors import CapacityError, ConfigError
from megatron_implicit.inference.forward import logits_of
from megatron_implicit.inference.sampling import GREEDY, Sampling, TokenChooser
from megatron_implicit.inference.session import SIMULTANEOUS, InferenceSession, Solved, SolveMode


@dataclass(frozen=True)
class GeneratedToken:
    """A token and what it took."""

    sample: int
    """Index of the prompt it continues."""
    token: int
    """Its id."""
    evaluations: int
    """Evaluations of F that the solve it was drawn from executed for its sample: the one of the token before it."""
    converged: bool
    """Whether that solve reached its tolerance."""


@dataclass
class Generation:
    """What became of one prompt."""

    prompt: list[int]
    """Ids it began with."""
    tokens: list[GeneratedToken] = field(default_factory=list)
    """What was generated, the stopping token included."""
    stopped: Optional[Literal["end", "length", "cache"]] = None
    """At a stopping token, after max_tokens, or with a full cache; None while it goes on."""

    @property
    def ids(self) -> list[int]:
        """Ids of the generated tokens."""
        return [entry.token for entry in self.tokens]


class TokenStream:
    """Generates for a batch of prompts: iterating yields the new tokens of each step, one for each running sample.

    Samples that have ended leave the batch. ``generations`` holds what there is so far, ``finish()`` runs to the end.

    Args:
        session: a fresh one, with one sample for each prompt.
        prompts: token ids, at least one a prompt.
        max_tokens: most tokens to generate for each.
        sampling: how tokens are chosen.
        stop_ids: tokens that end a sample.
        mode: how the prompts are solved; what follows is sequential by nature.
        vocabulary: choose among ids below this only (a model may have more rows than its tokenizer has tokens).

    Raises:
        ConfigError: an empty prompt or an impossible number.
        CapacityError: a prompt longer than the session's cache.
    """

    def __init__(
        self,
        session: InferenceSession,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        stop_ids: Collection[int] = (),
        mode: SolveMode = SIMULTANEOUS,
        vocabulary: Optional[int] = None,
    ) -> None:
        _check(session, prompts, max_tokens)
        self.generations = [Generation(list(prompt)) for prompt in prompts]
        self._session, self._mode, self._vocabulary = session, mode, vocabulary
        self._max_tokens, self._stop_ids = max_tokens, frozenset(stop_ids)
        self._chooser = TokenChooser(sampling, len(prompts))
        self._running = list(range(len(prompts)))

    def __iter__(self) -> Iterator[list[GeneratedToken]]:
        solved = self._solve_prompts()
        while True:
            step = self._choose(solved)
            for entry in step:
                self.generations[entry.sample].tokens.append(entry)
            ids = self._continue_with(step)
            yield step
            if ids is None:
                return
            solved = self._session.advance(ids)

    def finish(self) -> list[Generation]:
        """Generates to the end."""
        for _ in self:
            pass
        return self.generations

    def _solve_prompts(self) -> Solved:
        lengths = [len(generation.prompt) for generation in self.generations]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, generation in zip(ids, self.generations):
            row[: len(generation.prompt)] = torch.tensor(generation.prompt)
        return self._session.advance(ids.to(self._session.device), lengths, self._mode)

    @torch.no_grad()
    def _choose(self, solved: Solved) -> list[GeneratedToken]:
        logits = logits_of(self._session.model, solved.last.unsqueeze(0))[0, :, : self._vocabulary]
        tokens = self._chooser.choose(logits, self._running)
        numbers = zip(self._last(solved.trace.evaluations), self._last(solved.trace.converged))
        return [GeneratedToken(*entry) for entry in zip(self._running, tokens, *zip(*numbers))]

    def _last(self, values: Tensor) -> list:
        """By sample of a trace by sample, or of its last token where the trace is by token (prompts)."""
        if values.ndim == 1:
            return values.tolist()
        ends = torch.tensor([len(generation.prompt) - 1 for generation in self.generations], device=values.device)
        return values.gather(1, ends[:, None]).squeeze(1).tolist()

    def _continue_with(self, step: list[GeneratedToken]) -> Optional[Tensor]:
        """The next tokens to solve, [running, 1]; None when every sample has ended."""
        for entry, position in zip(step, self._session.positions):
            self.generations[entry.sample].stopped = self._reason(entry, position)
        going = [row for row, entry in enumerate(step) if self.generations[entry.sample].stopped is None]
        if not going:
            return None
        if len(going) < len(step):
            self._session.keep(going)
            self._running = [self._running[row] for row in going]
        return torch.tensor([[step[row].token] for row in going], device=self._session.device)

    def _reason(self, entry: GeneratedToken, position: int) -> Optional[Literal["end", "length", "cache"]]:
        if entry.token in self._stop_ids:
            return "end"
        if len(self.generations[entry.sample].tokens) >= self._max_tokens:
            return "length"
        capacity = self._session.capacity
        return "cache" if capacity is not None and position >= capacity else None


def _check(session: InferenceSession, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens} must be at least 1")
    if not prompts:
        raise ConfigError("there is no prompt: give at least one")
    vocabulary = session.model.config.vocab_size
    for number, prompt in enumerate(prompts, start=1):
        if not len(prompt):
            raise ConfigError(f"prompt {number} has no tokens: begin it with the end-of-text token")
        wrong = [token for token in prompt if not 0 <= token < vocabulary]
        if wrong:
            raise ConfigError(
                f"prompt {number} holds token {wrong[0]}, outside the vocabulary of {vocabulary}: use the model's "
                "tokenizer"
            )
        if session.capacity is not None and len(prompt) > session.capacity:
            raise CapacityError(needed=len(prompt), capacity=session.capacity, what=f"prompt {number}: ")
