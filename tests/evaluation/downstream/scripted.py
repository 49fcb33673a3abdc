"""A model of lm-eval without a model: its scores depend on the texts alone, so metrics can be worked out by hand."""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM


class ByLength(LM):
    """Every character of a continuation costs 1, and the last words are always the greedy ones."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.asked += [request.args for request in requests]
        return [(-float(len(request.args[1])), True) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError
