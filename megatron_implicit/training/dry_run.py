"""``launch/pretrain.py --dry-run``: builds a model on the meta device and says what it would cost."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import Iterable, Iterator

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_implicit.config import Config, SolverConfig
from megatron_implicit.config.resolve import solver_of_phase
from megatron_implicit.device import prepare_megatron
from megatron_implicit.telemetry.flops import model_flops

prepare_megatron()

from megatron_implicit.models.builder import build_model  # noqa: E402
from megatron_implicit.models.parameters import ComponentCount, count_parameters  # noqa: E402
from megatron_implicit.training.data import open_run_tokenizer  # noqa: E402

from megatron.core import parallel_state, tensor_parallel  # isort: skip  # noqa: E402

GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank. Parameters and gradients are exact; optimizer state is that of one replica; effective weights
    and activations are what autograd keeps, traced on the meta device: activations of one pass of F times the passes
    with gradient, plus the head's."""

    parameters: int
    gradients: int
    optimizer: int
    weights: int
    activations: int

    @property
    def total(self) -> int:
        """All of it; allocator and communication buffers come on top."""
        return self.parameters + self.gradients + self.optimizer + self.weights + self.activations


def print_plan(config: Config) -> None:
    """Prints parameters by component, memory a rank and FLOPs a token for each phase.

    Raises:
        DataError: model.vocab_size is not set and there is no tokenizer to take it from.
    """
    if config.model.vocab_size is None:
        open_run_tokenizer(config)
    model = _build_on_meta(config)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    counts = count_parameters(model)
    console.print(_parameter_table(config, counts))
    with _buffers_on_meta():
        kept = _kept_bytes(config, model)
    console.print(_phase_table(config, kept, counts))
    console.print(_assumptions(config))


def count_on_meta(config: Config) -> dict[str, ComponentCount]:
    """Parameters of a resolved configuration with a known vocabulary, by component; can be called once a process."""
    return count_parameters(_build_on_meta(config))


def _build_on_meta(config: Config) -> torch.nn.Module:
    """Rank 0's model of a layout that exists only in name: torch's fake process group answers for the other ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.parallel.tensor)
    parallel_state.initialize_model_parallel(config.parallel.tensor, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(config.train.seed, force_reset_rng=True)
    with torch.device("meta"):
        return build_model(config, initialise=False)


def _parameter_table(config: Config, counts: dict[str, ComponentCount]) -> Table:
    table = Table(title=f"{config.model.family} {config.model.size}: parameters", title_justify="left")
    table.add_column("component")
    for name in ("whole model", "this rank", "MiB on this rank"):
        table.add_column(name, justify="right")
    for component, count in counts.items():
        table.add_row(component, f"{count.whole:,}", f"{count.local:,}", f"{count.local_bytes / 2**20:,.1f}")
    total = [sum(getattr(count, name) for count in counts.values()) for name in ("whole", "local", "local_bytes")]
    table.add_section()
    table.add_row("total", f"{total[0]:,}", f"{total[1]:,}", f"{total[2] / 2**20:,.1f}")
    return table


def _phase_table(config: Config, kept: KeptBytes, counts: dict[str, ComponentCount]) -> Table:
    flops = model_flops(config)
    table = Table(title="memory of a rank (GiB) and model FLOPs of a token, by phase", title_justify="left")
    table.add_column("phase")
    for name in ("parameters", "gradients", "optimizer", "weights", "activations", "total", "FLOPs/token", "FLOPs/run"):
        table.add_column(name, justify="right")
    for name, solver, share in _phases(config):
        memory = memory_plan(config, counts, kept, solver)
        cost = flops.of_phase(solver, config.implicit)
        row = [f"{size / GIB:.2f}" for size in (*vars(memory).values(), memory.total)]
        table.add_row(name, *row, f"{cost:.3g}", f"{cost * share * config.train.tokens:.3g}")
    return table


def _phases(config: Config) -> Iterator[tuple[str, SolverConfig, float]]:
    """(name, solver, share of the run's tokens) of each phase."""
    if not config.implicit:
        yield "single pass", config.solver, 1.0
        return
    ends = [phase.start for phase in config.curriculum[1:]] + [1.0]
    for phase, end in zip(config.curriculum, ends):
        solver = solver_of_phase(config.solver, phase)
        passes = (
            f"0+{solver.max_iterations}"
            if solver.gradient == "unrolled"
            else f"{solver.max_iterations}+{solver.phantom_steps}"
        )
        yield f"{phase.name} ({passes})", solver, end - phase.start


def memory_plan(config: Config, counts: dict[str, ComponentCount], kept: KeptBytes, solver: SolverConfig) -> MemoryPlan:
    """Bytes of one rank in a phase.

    Args:
        config: resolved.
        counts: of ``count_parameters``.
        kept: for the backward pass.
        solver: of the phase.
    """
    local = sum(count.local for count in counts.values())
    low_precision = config.train.precision == "bf16"
    passes = solver.max_iterations if solver.gradient == "unrolled" else solver.phantom_steps
    tokens = config.data.sequence_length * config.train.micro_batch_size
    # Logits in the parameters' precision, then exp(logits) and its gradient in fp32.
    head = tokens * config.model.vocab_size // config.parallel.tensor * (2 * 4 + (2 if low_precision else 4))
    return MemoryPlan(
        parameters=sum(count.local_bytes for count in counts.values()),
        gradients=4 * local,
        optimizer=4 * local * (3 if low_precision else 2),
        weights=kept.shared,
        activations=(passes if config.implicit else 1) * kept.one_pass + head,
    )


@dataclass(frozen=True)
class KeptBytes:
    """What autograd keeps of a microbatch, without parameters."""

    shared: int
    """Effective weights, injection and what their backward needs: once, however many passes."""
    one_pass: int
    """Of one pass of F."""


class _Kept:
    """Counts tensors by identity of their storage's owner; on the meta device there are no addresses."""

    def __init__(self, known: Iterable[torch.Tensor], sequence_length: int) -> None:
        self._scores = (sequence_length, sequence_length)
        self._seen: dict[int, torch.Tensor] = {id(self._base(tensor)): tensor for tensor in known}
        self.bytes = 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a tensor that was not seen before; returns it, as a hook must."""
        base = self._base(tensor)
        # On the meta device attention is unfused and keeps its scores; flash attention does not.
        if tensor.ndim > 2 and tuple(tensor.shape[-2:]) == self._scores:
            return tensor
        if id(base) not in self._seen:
            self._seen[id(base)] = base
            self.bytes += base.numel() * base.element_size()
        return tensor

    @staticmethod
    def _base(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor._base is None else tensor._base


def _kept_bytes(config: Config, model: torch.nn.Module) -> KeptBytes:
    """Traces the start of a microbatch and one pass of F with shapes only."""
    tokens = config.data.sequence_length // (config.parallel.tensor if config.parallel.sequence else 1)
    z = torch.zeros(tokens, config.train.micro_batch_size, config.model.hidden_size, device="meta", requires_grad=True)
    rotary = None
    if config.architecture == "llama":
        rotary = torch.zeros(config.data.sequence_length, 1, 1, model.config.kv_channels, device="meta")
    kept = _Kept(model.parameters(), config.data.sequence_length)
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        bound_pass = model.decoder.begin(z)
        for weight in bound_pass.weights.values():
            kept.add(weight.weight)
        shared = kept.bytes
        model.decoder.evaluate(z, bound_pass, rotary)
    return KeptBytes(shared, kept.bytes - shared)


@contextlib.contextmanager
def _buffers_on_meta() -> Iterator[None]:
    """Megatron-Core allocates the buffers of its collectives on the current device, whatever their input's."""
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")
    try:
        yield
    finally:
        torch.cuda.current_device = current_device


def _assumptions(config: Config) -> str:
    parallel, train = config.parallel, config.train
    sharded = (
        " (not divided here: parallel.distributed_optimizer shards them over the replicas)"
        if parallel.distributed_optimizer
        else ""
    )
    return (
        f"layout: tensor {parallel.tensor}{', sequence parallel' if parallel.sequence else ''}, "
        f"recompute {parallel.recompute}, "
        f"{train.precision}, microbatch {train.micro_batch_size} x {config.data.sequence_length} tokens\n"
        f"activations are traced with the torch version of the scan, and "
        "without attention scores, which flash attention does not keep\n"
        f"FLOPs if every solve runs to its maximum; gradients fp32, AdamW moments and main parameters fp32{sharded}"
    )
