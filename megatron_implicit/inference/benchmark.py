"""Whether generating costs more, the longer it goes on: time an evaluation and memory, early and late."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Callable

import torch

from megatron_implicit.comm.groups import place_from_environment, start_model_parallel, start_process_group
from megatron_implicit.config import Config
from megatron_implicit.device import current_platform
from megatron_implicit.inference.forward import logits_of
from megatron_implicit.inference.session import InferenceSession
from megatron_implicit.models import build_model


@dataclass
class GenerateBenchmark:
    """Greedy generation with a freshly initialised model.

    Args:
        config: resolved; its ``inference`` section says how a token is solved.
        early, late: positions between which time and memory are compared.
        window: tokens around each position that are timed.
    """

    config: Config
    early: int
    late: int
    window: int
    _tokens: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        place = place_from_environment()
        start_process_group(place)
        start_model_parallel(self.config.parallel)
        self.model = build_model(self.config).to(current_platform().device(place.local_rank)).eval()

    def run(self, report: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
        """Median seconds an evaluation in both windows, memory at both positions, and their ratios.

        One session goes through to the late position; a second one is then taken to the early one, and both take
        turns, so that a slow moment of the machine meets both.
        """
        late = self._session()
        memory = {}
        for position in range(self.late):
            self._step(late)
            if position + 1 in (self.early, self.late):
                memory[position + 1] = (late.states.nbytes, current_platform().memory_bytes())
            report(position + 1, self.late)
        early = self._session()
        for _ in range(self.early):
            self._step(early)
        times: dict[int, list[float]] = {self.early: [], self.late: []}
        for _ in range(self.window):
            for position, session in ((self.early, early), (self.late, late)):
                times[position].append(self._timed(session))
        medians = {position: statistics.median(values) for position, values in times.items()}
        states, resident = ({position: entry[i] for position, entry in memory.items()} for i in (0, 1))
        return {
            "device": current_platform().name,
            "torch": torch.__version__,
            "family": self.config.model.family,
            "layers": self.config.model.num_layers,
            "width": self.config.model.hidden_size,
            "positions": [self.early, self.late],
            "window_tokens": self.window,
            "evaluation_s": list(medians.values()),
            "evaluation_time_ratio": medians[self.late] / medians[self.early],
            "state_bytes": list(states.values()),
            "resident_bytes": list(resident.values()),
            "resident_ratio": resident[self.late] / resident[self.early],
        }

    def _session(self) -> InferenceSession:
        session = InferenceSession(self.model, 1, self.late + self.window)
        self._tokens[id(session)] = torch.zeros(1, 1, dtype=torch.long, device=session.device)
        return session

    def _step(self, session: InferenceSession) -> int:
        """One token; evaluations it took, the output pass included."""
        solved = session.advance(self._tokens[id(session)])
        self._tokens[id(session)] = logits_of(self.model, solved.last[None]).argmax(-1)
        return int(solved.trace.evaluations) + int(self.config.implicit)

    def _timed(self, session: InferenceSession) -> float:
        platform = current_platform()
        platform.synchronize()
        began = time.perf_counter()
        evaluations = self._step(session)
        platform.synchronize()
        return (time.perf_counter() - began) / evaluations

