"""The recirculating schedule on real processes: recorded, then replayed without the processes' fight for the cores.

Every stage is a process. Where there are fewer cores than stages, a recorded step's clock says little about the
schedule: stages that compute at once take turns. Its event graph is real, though: every task of every stage, what it
waited for, and how many evaluations each solve took. The replay gives every task the median time of its sort on its
stage (on a CPU the processor's time, which does not run while another process has the core), every message the time it
takes between two idle processes, and lets the stages' logic choose among the tasks whose messages are there.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Iterator, Optional

import torch
import torch.distributed as dist

from megatron_implicit.comm.groups import Place, start_model_parallel, start_process_group
from megatron_implicit.config import Config, SolverConfig
from megatron_implicit.config.resolve import solver_of_phase
from megatron_implicit.device import current_platform
from megatron_implicit.models import build_model
from megatron_implicit.planning.cluster import Assumptions, Cluster
from megatron_implicit.planning.evaluations import Evaluations
from megatron_implicit.planning.layouts import Layout
from megatron_implicit.planning.plan import Planner
from megatron_implicit.planning.timing import Timing
from megatron_implicit.schedules import Kind, Limits, Message, TaskRecord
from megatron_implicit.schedules.costs import Link, LinkCosts, MeasuredCosts
from megatron_implicit.schedules.recirculating import RecirculatingSchedule, plan_step
from megatron_implicit.schedules.simulator import replay, simulate
from megatron_implicit.schedules.timeline import Timeline, cut_into_steps
from megatron_implicit.solver import SolveSettings
from megatron_implicit.training.optimizer import prepare_training
from megatron_implicit.training.step import forward_backward_function

from megatron.core import parallel_state  # isort: skip

WARM_UP = 8
"""Microbatches of the step before the one that is recorded."""


class TaskList:
    """A recorder that keeps what it gets, and what each task took."""

    def __init__(self) -> None:
        self.tasks: list[TaskRecord] = []
        self.measured: list[TaskRecord] = []
        """The same tasks with the time they took: on a CPU that of the processor since the task before, so with the
        messages in between and without waiting."""
        self._before = time.thread_time()

    def record(self, task: TaskRecord) -> None:
        """Keeps a task."""
        now = time.thread_time()
        on_cpu = current_platform().device_type == "cpu"
        self.measured.append(task._replace(end=task.start + now - self._before) if on_cpu else task)
        self.tasks.append(task)
        self._before = now


@dataclass(frozen=True)
class Recording:
    """A step of one phase, as all stages recorded it."""

    name: str
    solver: SolverConfig
    timeline: Timeline
    costs: MeasuredCosts


@dataclass
class PipelineBenchmark:
    """One process of it; every process of the job makes one.

    Args:
        config: resolved, implicit, a pipeline of as many stages as there are processes.
        place: this process in the job.
    """

    config: Config
    place: Place

    def __post_init__(self) -> None:
        start_process_group(self.place)
        start_model_parallel(self.config.parallel, self.config.train.seed)
        self.device = current_platform().use(self.place.local_rank)
        self.link = self._measure_link()
        self.cluster = self._measure_cluster()
        self._build()
        self.cluster = self._calibrated(self.cluster)
        self.config.parallel.layers_per_stage = list(self._planner([]).layers(self._layout))
        self._build()

    def _build(self) -> None:
        parts = prepare_training(self.config, build_model(self.config).to(self.device))
        self._model = parts.model
        self._schedule: RecirculatingSchedule = forward_backward_function(self.config)

    def run(self) -> Optional[tuple[dict[str, Any], dict[str, Timeline]]]:
        """Records a step of every phase; rank 0 gets the result for JSON, and recorded and replayed timelines."""
        phases = [(phase.name, solver_of_phase(self.config.solver, phase)) for phase in self.config.curriculum]
        recordings = [self._record(name, solver, self._microbatches) for name, solver in phases]
        if self.place.rank != 0:
            return None
        timelines: dict[str, Timeline] = {}
        result = self._settings() | {"phases": {}}
        for recording in recordings:
            recorded = recording.timeline
            replayed = simulate(recorded.plan, recorded.evaluations, recording.costs, LinkCosts(Link(self.link)))
            timelines |= {f"{recording.name}: replayed": replayed, f"{recording.name}: recorded": recording.timeline}
            result["phases"][recording.name] = self._phase(recording, replayed)
        return result, timelines

    # ---------------------------------------------------------------- recording

    def _record(self, name: str, solver: SolverConfig, microbatches: int) -> Recording:
        settings = SolveSettings.training(solver)
        self._model.module.decoder.solver = settings
        self._model.train()
        self._step(WARM_UP)
        recorder = TaskList()
        self._schedule.recorder = recorder
        dist.barrier()
        self._step(microbatches)
        self._schedule.recorder = None
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (recorder.tasks, recorder.measured))
        plan = plan_step(settings, len(gathered), microbatches, self._limits)
        (timeline,) = cut_into_steps(plan, (task for tasks, _ in gathered for task in tasks))
        costs = MeasuredCosts(plan, (task for _, measured in gathered for task in measured))
        return Recording(name, solver, timeline, costs)

    def _step(self, microbatches: int) -> None:
        self._model.zero_grad_buffer()
        self._schedule(
            forward_step_func=_forward_step,
            data_iterator=self._batches(microbatches),
            model=self._model,
            num_microbatches=microbatches,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.train.micro_batch_size,
        )

    def _batches(self, count: int) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.config.train.micro_batch_size, self.config.data.sequence_length + 1)
        for _ in range(count):
            yield torch.randint(0, self.config.model.vocab_size, shape, generator=generator).to(self.device)

    # ---------------------------------------------------------------- what machine and links take

    def _measure_link(self) -> float:
        """Seconds of an iterate from one process to another, by half of a round trip while the others wait."""
        size = self.config.data.sequence_length * self.config.train.micro_batch_size * self.config.model.hidden_size
        tensor, rounds, times = torch.zeros(size, device=self.device), 40, []
        for _ in range(rounds if self.place.rank < 2 else 0):
            began = time.perf_counter()
            for sender in (0, 1):
                (dist.send if self.place.rank == sender else dist.recv)(tensor, 1 - self.place.rank)
            current_platform().synchronize()
            times.append((time.perf_counter() - began) / 2)
        # The lower quartile: another program on the machine can only make it longer.
        values = [statistics.quantiles(times)[0] if times else None]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def _measure_cluster(self) -> Cluster:
        """This machine as the planner sees machines: what products and copies reach on rank 0 while the others wait."""
        values = [None]
        if self.place.rank == 0:
            width, rows = 512, 1 << 22
            left, right = torch.rand(width, width, device=self.device), torch.rand(width, width, device=self.device)
            data = torch.rand(rows, device=self.device)
            product, copy_ = _median_seconds(lambda: left @ right), _median_seconds(lambda: data.clone())
            values = [(2 * width**3 / product, 8 * rows / copy_)]
        dist.broadcast_object_list(values, src=0)
        peak, bandwidth = values[0]
        return Cluster(
            nodes=1, devices=self.place.world_size, device=current_platform().name, peak=peak, memory_bytes=1e18,
            memory_bandwidth=bandwidth, inside=1e18, between=1e18, latency_inside=self.link,
            latency_between=self.link, assumed=Assumptions(1.0, 1.0, 1.0, decision=0.0),
        )  # fmt: skip

    def _calibrated(self, cluster: Cluster) -> Cluster:
        """With a layer's overhead as a short step shows it: what its products and traffic do not explain."""
        solver = solver_of_phase(self.config.solver, self.config.curriculum[0])
        costs = self._record("calibration", solver, WARM_UP).costs
        layer = costs.seconds(0, Message(Kind.SOLVE, 0, 1)) / self.config.parallel.layers_per_stage[0]
        explained = Timing(self.config, self._layout, cluster).layer
        assumed = replace(cluster.assumed, layer_overhead=max(0.0, layer - explained))
        return replace(cluster, assumed=assumed)

    # ---------------------------------------------------------------- what became of it

    def _phase(self, recording: Recording, replayed: Timeline) -> dict[str, Any]:
        recorded, plan = recording.timeline, recording.timeline.plan
        same_order = replay(recorded, recording.costs, LinkCosts(Link(self.link)))
        cost = self._planner(recorded.evaluations).plan(self._layout, tuple(self.config.parallel.layers_per_stage))
        predicted = next(phase for phase in cost.phases if phase.phase.name == recording.name)
        return {
            "passes": f"{recording.solver.max_iterations}+{plan.passes}",
            "bubble_percent": 100 * replayed.bubble,
            "planner_bubble_percent": 100 * predicted.bubble,
            "imbalance_percent": 100 * replayed.imbalance,
            "recorded_order_bubble_percent": 100 * same_order.bubble,
            "recorded_clock_bubble_percent": 100 * recorded.bubble,
            "makespan_s": replayed.makespan,
            "busy_s": replayed.busy,
            "task_s": recording.costs.by_stage(),
            "evaluations": dict(sorted(Counter(recorded.evaluations).items())),
        }

    def _settings(self) -> dict[str, Any]:
        model, limits = self.config.model, self._limits
        return {
            "device": current_platform().name,
            "family": model.family,
            "layers_per_stage": self.config.parallel.layers_per_stage,
            "width": model.hidden_size,
            "vocabulary": model.vocab_size,
            "tokens": self.config.data.sequence_length * self.config.train.micro_batch_size,
            "microbatches": self._microbatches,
            "limits": {"solving": limits.solving, "graphs": limits.graphs, "block": limits.block},
            "link_s": self.link,
        }

    @property
    def _microbatches(self) -> int:
        return self.config.train.global_batch_size // self.config.train.micro_batch_size

    @property
    def _limits(self) -> Limits:
        return Limits.default(self.config.parallel.pipeline, self.config.parallel.microbatches_in_flight)

    @property
    def _layout(self) -> Layout:
        train, parallel = self.config.train, self.config.parallel
        return Layout(1, parallel.pipeline, 1, train.micro_batch_size, False, parallel.recompute, self._limits)

    def _planner(self, evaluations: list[int]) -> Planner:
        """With recorded evaluations for phases that stop at a tolerance; none: the planner's assumption."""
        if not evaluations:
            return Planner(self.config, self.cluster)
        shares = tuple((number, count / len(evaluations)) for number, count in sorted(Counter(evaluations).items()))
        return Planner(self.config, self.cluster, Evaluations(shares))


def _forward_step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    """Megatron-Core's forward step function, on random tokens."""
    tokens = next(batches)
    losses = model(tokens[:, :-1], None, None, labels=tokens[:, 1:])
    return losses, lambda output: (output.mean(), {"loss": output.detach().mean()})


def _median_seconds(function: Any, repeats: int = 15) -> float:
    clock = time.thread_time if current_platform().device_type == "cpu" else time.perf_counter
    times = []
    for _ in range(repeats):
        began = clock()
        function()
        current_platform().synchronize()
        times.append(clock() - began)
    return statistics.median(times)
