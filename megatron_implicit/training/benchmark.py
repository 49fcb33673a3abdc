"""What a training step costs beyond its passes of F, measured in one run by interleaved medians."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch
from torch import Tensor

from megatron_implicit.comm.groups import place_from_environment, start_model_parallel, start_process_group
from megatron_implicit.config import Config
from megatron_implicit.device import current_platform
from megatron_implicit.device.determinism import fix_order_of_sums
from megatron_implicit.models import FixedPointDecoder, build_model
from megatron_implicit.solver import SolveSettings


@dataclass
class TrainStepBenchmark:
    """An implicit decoder with an embedding to solve for.

    Args:
        config: resolved, implicit; its sequence length and micro batch give the tokens.
        evaluations: fixed number of evaluations of a solve.
        phantom_steps: passes with gradient.
    """

    config: Config
    evaluations: int
    phantom_steps: int

    def __post_init__(self) -> None:
        if self.config.train.deterministic:
            fix_order_of_sums()
        place = place_from_environment()
        start_process_group(place)
        start_model_parallel(self.config.parallel)
        self.device = current_platform().device(place.local_rank)
        model = build_model(self.config).to(self.device)
        self.decoder: FixedPointDecoder = model.decoder.train()
        shape = (self.config.data.sequence_length, self.config.train.micro_batch_size)
        tokens = torch.randint(0, self.config.model.vocab_size, shape[::-1], generator=torch.Generator().manual_seed(0))
        self.embedding = model.embedding(tokens.to(self.device), None).detach().requires_grad_()
        rotary = getattr(model, "rotary_pos_emb", None)
        self.rotary = rotary(shape[0]) if rotary is not None else None

    def run(self, repeats: int) -> dict[str, Any]:
        """Seconds of both sides and their ratio, tokens/s, and bytes kept for the backward pass."""
        self.set_evaluations(self.evaluations)
        bare, solved = interleaved_medians([self._bare_passes, self.solve], repeats)
        tokens = self.embedding.shape[0] * self.embedding.shape[1]
        return {
            "device": current_platform().name,
            "torch": torch.__version__,
            "family": self.config.model.family,
            "layers": self.config.model.num_layers,
            "width": self.config.model.hidden_size,
            "tokens": tokens,
            "evaluations": self.evaluations,
            "phantom_steps": self.phantom_steps,
            "repeats": repeats,
            "bare_passes_s": bare,
            "solve_and_phantom_s": solved,
            "overhead_ratio": solved / bare,
            "tokens_per_s": tokens / solved,
            "saved_bytes": {str(count): self.saved_bytes(count) for count in (4, 64)},
        }

    def saved_bytes(self, evaluations: int) -> int:
        """Bytes that autograd keeps between a forward and a backward pass, each storage once."""
        self.set_evaluations(evaluations)
        with counting_saved_bytes() as storages:
            z = self.decoder(self.embedding, rotary_pos_emb=self.rotary)
        z.sum().backward()
        return sum(storages.values())

    def set_evaluations(self, evaluations: int) -> None:
        """Every solve takes exactly so many."""
        solver = self.config.solver
        solver.max_iterations, solver.tolerance, solver.phantom_steps = evaluations, 0.0, self.phantom_steps
        self.decoder.solver = SolveSettings.training(solver)

    def solve(self) -> None:
        """One solve, the passes with gradient and their backward passes."""
        self.decoder(self.embedding, rotary_pos_emb=self.rotary).sum().backward()

    def _bare_passes(self) -> None:
        """As many passes of F, with and without gradient, and nothing else."""
        bound_pass = self.decoder.begin(self.embedding)
        z = torch.zeros_like(self.embedding).detach()
        with torch.no_grad():
            for _ in range(self.evaluations):
                z = self.decoder.evaluate(z, bound_pass, self.rotary)
        for _ in range(self.phantom_steps):
            z = self.decoder.evaluate(z, bound_pass, self.rotary)
        z.sum().backward()


@contextlib.contextmanager
def counting_saved_bytes() -> Iterator[dict[int, int]]:
    """Collects the storages that autograd saves inside the block: their bytes by address."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            kept.append(tensor)
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def interleaved_medians(functions: list[Callable[[], None]], repeats: int) -> list[float]:
    """Median seconds of each function; they take turns, so that a slow moment of the machine meets them all."""
    platform, times = current_platform(), [[] for _ in functions]
    for round_number in range(repeats + 1):
        for function, measured in zip(functions, times):
            platform.synchronize()
            began = time.perf_counter()
            function()
            platform.synchronize()
            if round_number:  # the first round warms up
                measured.append(time.perf_counter() - began)
    return [statistics.median(measured) for measured in times]
