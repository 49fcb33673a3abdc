"""Short deterministic training runs on the current process groups: losses, norms, counts and final parameters."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Iterator, Optional

import torch
import torch.distributed as dist

from megatron_implicit.comm.groups import start_model_parallel
from megatron_implicit.config import Config, config_from_dict, config_to_dict
from megatron_implicit.conversion.reference import gather_reference, load_reference_weights, over_stages
from megatron_implicit.models import build_model
from megatron_implicit.solver import SolveSettings
from megatron_implicit.training.curriculum import Curriculum
from megatron_implicit.training.optimizer import TrainingParts, prepare_training
from megatron_implicit.training.step import StepRunner
from tests import goldens

from megatron.core import parallel_state  # isort: skip


@dataclass(frozen=True)
class Layout:
    """How the processes of a test share the model and the batch."""

    tensor: int = 1
    pipeline: int = 1
    layers_per_stage: Optional[list[int]] = None
    microbatches_in_flight: Optional[int] = None
    sequence: bool = False
    distributed_optimizer: bool = False
    recompute: str = "none"
    precision: str = "fp32"

    def apply(self, config: Config) -> Config:
        """A copy of a configuration on this layout."""
        values = config_to_dict(config)
        parallel = dataclasses.asdict(self)
        values["train"]["precision"] = parallel.pop("precision")
        values["parallel"] |= parallel
        return config_from_dict(values)


@dataclass
class Trace:
    """One row a step."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    iterations: list[list[int]] = field(default_factory=list)
    """Of every sample of the global batch, in order."""
    evaluations: list[list[int]] = field(default_factory=list)
    """Of every microbatch of the global batch, in order."""
    residuals: list[list[list[float]]] = field(default_factory=list)
    """Of every sample of the global batch, in order: every evaluation's."""
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    """Whole tensors under reference keys, after the last step."""
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Whole main gradients of the last step, clipped."""


def golden_training_config(family: str) -> Config:
    """The run that made the golden training traces; for an explicit family, its own model in the implicit one's run."""
    implicit = family.replace("explicit", "implicit")
    meta = json.loads(str(goldens.arrays(f"{implicit}_training")["meta_json"]))
    values = config_to_dict(goldens.golden_config(family))
    steps = meta["steps"]
    values["curriculum"] = [
        {"name": "bounded", "start": 0.0, **meta["bounded"]},
        {"name": "free", "start": (meta["free_phase_from_step"] - 1) / steps},
    ]
    values["data"]["sequence_length"] = meta["sequence"]
    values["train"] |= {
        "steps": steps, "tokens": None, "global_batch_size": meta["global_batch"],
        "micro_batch_size": meta["micro_batch"],
    }  # fmt: skip
    values["optimizer"] |= {"learning_rate": meta["learning_rate"], "clip_grad_norm": meta["clip_grad_norm"]}
    values["schedule"] |= {
        "warmup_fraction": meta["warmup_steps"] / steps,
        "decay_fraction": (steps - meta["decay_from"]) / steps,
        "min_learning_rate": meta["min_lr"],
    }
    return config_from_dict(values)


def prepare(config: Config, weights: dict[str, torch.Tensor] | None) -> TrainingParts:
    """Model, optimizer and schedule on the configuration's layout; ``weights`` under reference keys, or initialised."""
    return prepare_training(config, build(config, weights))


def build_golden(config: Config, family: str) -> torch.nn.Module:
    """A golden model on the configuration's layout."""
    return build(config, goldens.state_dict(family))


def build(config: Config, weights: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """A model on the configuration's layout; ``weights`` under reference keys, or initialised."""
    start_model_parallel(config.parallel, config.train.seed)
    model = build_model(config, initialise=weights is None)
    if weights is not None:
        load_reference_weights(model, weights, "test")
    return model


def train(config: Config, parts: TrainingParts, tokens: torch.Tensor, first_step: int = 1) -> Trace:
    """Trains on ``tokens`` [steps, global batch, sequence + 1], step by step."""
    runner, curriculum, trace = StepRunner(config, parts), Curriculum(config), Trace()
    per_step = config.train.global_batch_size * config.data.sequence_length
    model = parts.model.module
    for step, batch in enumerate(tokens, start=first_step):
        if config.implicit:
            model.decoder.solver = SolveSettings.training(curriculum.phase(step - 1, (step - 1) * per_step).solver)
        result = runner.run(step, microbatches(config, batch), torch.device("cpu"))
        trace.losses.append(result.loss)
        trace.grad_norms.append(result.grad_norm)
        trace.learning_rates.append(result.learning_rate)
        solves = [(t.iterations.tolist(), int(t.evaluations.max()), t.residuals.tolist()) for t in result.traces]
        merged = _interleave(over_stages(solves)[-1])
        trace.iterations.append([count for samples, _, _ in merged for count in samples])
        trace.evaluations.append([evaluations for _, evaluations, _ in merged])
        trace.residuals.append([values for _, _, samples in merged for values in samples])
    trace.parameters = {key: value.clone() for key, value in gather_reference(model).items()}
    trace.gradients = {k: v.clone() for k, v in gather_reference(model, lambda p: p.main_grad).items()}
    return trace


def microbatches(config: Config, batch: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """This replica's microbatches of a global batch [samples, sequence + 1]."""
    size = config.train.micro_batch_size
    rank, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for start in range(rank * size, len(batch), size * replicas):
        rows = batch[start : start + size].long()
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        yield {"tokens": tokens, "labels": labels, "loss_mask": torch.ones_like(tokens, dtype=torch.float32)}


def _interleave(counts: list[Any]) -> list[Any]:
    """Per-microbatch entries of all replicas, in the order of the global batch."""
    group = parallel_state.get_data_parallel_group()
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, counts, group=group)
    return [entry for entries in zip(*gathered) for entry in entries]


def run_golden_training(family: str, layout: Layout) -> Trace:
    """The 30 golden steps on a layout."""
    config = layout.apply(golden_training_config(family))
    parts = prepare(config, goldens.state_dict(family))
    return train(config, parts, torch.from_numpy(goldens.arrays(f"{family}_training")["tokens"]))


def golden_losses(family: str) -> list[float]:
    """The losses of the golden steps."""
    return [row["loss"] for row in json.loads(str(goldens.arrays(f"{family}_training")["rows_json"]))]


def check_golden_training(trace: Trace, family: str) -> None:
    """The tolerances of golden/README.md: losses 1e-5, gradient norms 1e-4 relative, counts identical."""
    rows = json.loads(str(goldens.arrays(f"{family}_training")["rows_json"]))
    for index, row in enumerate(rows):
        assert abs(trace.losses[index] / row["loss"] - 1) <= 1e-5, (index, trace.losses[index], row["loss"])
        assert abs(trace.grad_norms[index] / row["grad_norm"] - 1) <= 1e-4, index
        assert abs(trace.learning_rates[index] / row["learning_rate"] - 1) <= 1e-9, index
        assert trace.iterations[index] == [int(count) for count in row["iterations"]], index
        assert trace.evaluations[index] == row["evaluations"], index
    for key, expected in goldens.arrays(f"{family}_training").items():
        if key.startswith("final/"):
            # Adam divides rounding by rounding where a gradient is nearly zero: the bias of k moves by 1e-4.
            difference = trace.parameters[key[6:]] - torch.from_numpy(expected)
            assert float(difference.norm() / torch.from_numpy(expected).norm()) <= 1e-3, key
