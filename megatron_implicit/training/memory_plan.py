"""Bytes of a rank of each pipeline stage, from models that are built and traced without being allocated."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Iterable, Iterator

import torch
import torch.distributed as dist

from megatron_implicit.config import Config, SolverConfig
from megatron_implicit.device import prepare_megatron

prepare_megatron()

from megatron_implicit.layers.stack_config import Stage  # noqa: E402
from megatron_implicit.models.builder import build_model  # noqa: E402
from megatron_implicit.models.decoder import FixedPointDecoder  # noqa: E402
from megatron_implicit.models.parameters import ComponentCount, count_parameters  # noqa: E402
from megatron_implicit.schedules import Limits  # noqa: E402

from megatron.core import parallel_state, tensor_parallel  # isort: skip  # noqa: E402


@dataclass(frozen=True)
class KeptBytes:
    """What autograd keeps on one rank, without parameters."""

    weights: int
    """Effective weights and what their backward needs: once, however many passes."""
    microbatch: int
    """Normed embedding and injection of a microbatch."""
    one_pass: int
    """Of one pass of F, or of the stage's slice of it."""
    iterate: int
    """z or h of a microbatch."""


@dataclass(frozen=True)
class StagePlan:
    """A rank of one stage."""

    stage: Stage
    counts: dict[str, ComponentCount]
    kept: KeptBytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank. Parameters and gradients are exact; optimizer state is that of one replica; effective weights
    and activations are what autograd keeps, traced on the meta device: activations of one pass of F times the passes
    with gradient, plus the head's; on a pipeline, of all microbatches in flight."""

    parameters: int
    gradients: int
    optimizer: int
    weights: int
    activations: int

    @property
    def total(self) -> int:
        """All of it; allocator and communication buffers come on top."""
        return self.parameters + self.gradients + self.optimizer + self.weights + self.activations


def plan_stages(config: Config) -> list[StagePlan]:
    """One rank of each pipeline stage, in order. No process group may exist; afterwards there is none either."""
    return [_plan_stage(config, stage) for stage in range(config.parallel.pipeline)]


def memory_plan(config: Config, plan: StagePlan, solver: SolverConfig) -> MemoryPlan:
    """Bytes of one rank of a stage in a phase."""
    local = sum(count.local for count in plan.counts.values())
    low_precision = config.train.precision == "bf16"
    return MemoryPlan(
        parameters=sum(count.local_bytes for count in plan.counts.values()),
        gradients=4 * local,
        optimizer=4 * local * (3 if low_precision else 2),
        weights=plan.kept.weights,
        activations=_activations(config, plan, solver),
    )


def _activations(config: Config, plan: StagePlan, solver: SolverConfig) -> int:
    """Of the microbatches in flight: W solve, G have graphs (``schedules.Limits``); 1F1B: P - p have graphs."""
    kept, stage = plan.kept, plan.stage
    head = _head_bytes(config) if stage.is_last else 0
    if not config.implicit:
        return (stage.count - stage.index) * kept.one_pass + head
    passes = solver.max_iterations if solver.gradient == "unrolled" else solver.phantom_steps
    if stage.count == 1:
        return kept.microbatch + passes * kept.one_pass + head
    limits = Limits.default(stage.count, config.parallel.microbatches_in_flight)
    iterates = limits.in_flight * stage.is_first + 3 * limits.solving * stage.is_last  # parked; z, F(z), best
    return (
        limits.in_flight * kept.microbatch
        + limits.graphs * passes * kept.one_pass
        + iterates * kept.iterate
        + head  # runs forwards and at once backwards
    )


def _head_bytes(config: Config) -> int:
    """Logits in the parameters' precision, then exp(logits) and its gradient in fp32."""
    tokens = config.data.sequence_length * config.train.micro_batch_size
    element = 2 if config.train.precision == "bf16" else 4
    return tokens * config.model.vocab_size // config.parallel.tensor * (2 * 4 + element)


def _plan_stage(config: Config, stage: int) -> StagePlan:
    """The first rank of a stage of a layout that exists only in name: torch's fake process group answers for the
    other ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline
    dist.init_process_group("fake", store=FakeStore(), rank=stage * parallel.tensor, world_size=ranks)
    try:
        parallel_state.initialize_model_parallel(
            parallel.tensor, parallel.pipeline, create_gloo_process_groups=False
        )
        tensor_parallel.model_parallel_cuda_manual_seed(config.train.seed, force_reset_rng=True)
        with torch.device("meta"):
            model = build_model(config, initialise=False)
        with _buffers_on_meta():
            kept = _trace(config, model)
        return StagePlan(model.decoder.stage, count_parameters(model), kept)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


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


def _trace(config: Config, model: torch.nn.Module) -> KeptBytes:
    """Traces the start of a microbatch and one pass of F with shapes only."""
    decoder = model.decoder
    tokens = config.data.sequence_length // (config.parallel.tensor if config.parallel.sequence else 1)
    shape = (tokens, config.train.micro_batch_size, config.model.hidden_size)
    z = torch.zeros(shape, device="meta", requires_grad=True)
    rotary = None
    if config.architecture == "llama":
        rotary = torch.zeros(config.data.sequence_length, 1, 1, model.config.kv_channels, device="meta")
    kept = _Kept(model.parameters(), config.data.sequence_length)
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        weights = decoder.effective_weights()
        for weight in weights.values():
            kept.add(weight.weight)
        of_weights = kept.bytes
        if isinstance(decoder, FixedPointDecoder) and not decoder.stage.is_first:
            x = torch.zeros(shape, dtype=model.config.params_dtype, device="meta", requires_grad=True)
            bound_pass = decoder.begin_normed(x, weights=weights)
        else:
            bound_pass = decoder.begin(z, weights=weights)
        if bound_pass.injection is not None:
            kept.add(bound_pass.injection)
        of_microbatch = kept.bytes - of_weights
        decoder.evaluate(z, bound_pass, rotary)
    one_pass = kept.bytes - of_weights - of_microbatch
    return KeptBytes(of_weights, of_microbatch, one_pass, z.numel() * z.element_size())


@contextlib.contextmanager
def _buffers_on_meta() -> Iterator[None]:
    """Megatron-Core allocates the buffers of its collectives on the current device, whatever their input's."""
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")
    try:
        yield
    finally:
        torch.cuda.current_device = current_device
