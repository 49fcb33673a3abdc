"""How the next token is chosen from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_implicit.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Greedy, or drawn from what temperature, top-k, top-p and min-p (in this order) leave of the distribution.

    Raises:
        ConfigError: an impossible value, by name.
    """

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability; 1 means all."""
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the most likely one; 0 means all."""
    seed: int = 0
    """Sample i draws with a generator seeded seed + i, so that its draws do not depend on its companions."""

    def __post_init__(self) -> None:
        for name, value, valid, bounds in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "must be a number from 0 up"),
            ("top_k", self.top_k, self.top_k >= 0, "must not be negative"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "must lie in [0, 1]"),
        ):
            if not valid:
                raise ConfigError(f"{name}={value} {bounds}")
        filters = [name for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)) if getattr(self, name) != off]
        if self.temperature == 0 and filters:
            raise ConfigError(f"{filters[0]} has no effect at temperature=0, which is greedy: set a temperature")


GREEDY = Sampling()


class TokenChooser:
    """Chooses tokens for a batch, each sample with draws of its own."""

    def __init__(self, sampling: Sampling, batch: int) -> None:
        self.sampling = sampling
        self._generators = [torch.Generator().manual_seed(sampling.seed + sample) for sample in range(batch)]

    def choose(self, logits: Tensor, samples: list[int]) -> list[int]:
        """One token for each of ``samples``, whose logits are the rows of ``logits`` [rows, vocab]."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1).tolist()
        cumulated = distribution(logits, self.sampling).cumsum(-1)
        draws = [torch.rand((), dtype=torch.float64, generator=self._generators[sample]) for sample in samples]
        # Below the total, which rounding may leave just under 1: a token of probability 0 is never drawn.
        thresholds = torch.stack(draws).to(logits.device)[:, None] * cumulated[:, -1:]
        return torch.searchsorted(cumulated, thresholds, right=True).squeeze(-1).tolist()


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [rows, vocab] in float64 that tokens are drawn with; ``temperature`` must not be 0."""
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = 0.0
    if sampling.top_p < 1.0:
        ordered = ordered / ordered.sum(-1, keepdim=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0.0
    ordered[ordered < sampling.min_p * ordered[:, :1]] = 0.0
    kept = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return kept / kept.sum(-1, keepdim=True)
