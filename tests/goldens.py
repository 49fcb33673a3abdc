"""Runs a golden case on the current process groups and returns how far we are from the reference's numbers."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Optional, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_implicit.comm.groups import start_model_parallel
from megatron_implicit.config import Config
from megatron_implicit.device import prepare_megatron

prepare_megatron()

from megatron_implicit.api import PretrainedModel  # noqa: E402
from megatron_implicit.conversion.reference import (  # noqa: E402
    config_from_reference,
    gather_reference,
    load_reference_weights,
)
from megatron_implicit.models import build_model  # noqa: E402
from megatron_implicit.solver import SolveTrace  # noqa: E402

FOLDER = Path(__file__).parent / "golden"
FAMILIES = ("implicit_mamba2", "implicit_llama", "explicit_mamba2", "explicit_llama")
IMPLICIT = FAMILIES[:2]


@functools.lru_cache(maxsize=None)
def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of a golden file, by name without .npz."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def state_dict(family: str) -> dict[str, torch.Tensor]:
    """The reference's state dict."""
    return {key[3:]: torch.from_numpy(value) for key, value in arrays(family).items() if key.startswith("sd/")}


def golden_config(
    family: str, *, tensor: int = 1, sequence: bool = False, layers_per_stage: Sequence[int] = ()
) -> Config:
    """Our configuration of a golden model on a layout."""
    config = config_from_reference(json.loads(str(arrays(family)["config_json"])), family)
    config.parallel.tensor, config.parallel.sequence = tensor, sequence
    if layers_per_stage:
        config.parallel.pipeline, config.parallel.layers_per_stage = len(layers_per_stage), list(layers_per_stage)
    return config


def golden_model(family: str, *, tensor: int = 1, sequence: bool = False) -> PretrainedModel:
    """A golden model, loaded onto a layout of the current process group."""
    config = golden_config(family, tensor=tensor, sequence=sequence)
    start_model_parallel(config.parallel)
    model = build_model(config, initialise=False)
    load_reference_weights(model, state_dict(family), family)
    return PretrainedModel(model, config)


def tensor(family: str, key: str) -> torch.Tensor:
    """A golden output."""
    return torch.from_numpy(np.asarray(arrays(f"{family}_out")[key]))


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The reference's loss: labels shifted by one, -100 ignored."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@dataclasses.dataclass
class CaseResult:
    """Distances of one case."""

    logits: float
    loss: float = 0.0
    gradients: dict[str, float] = dataclasses.field(default_factory=dict)
    gradient_norm: float = 0.0
    iterations: list[int] = dataclasses.field(default_factory=list)
    evaluations: int = 0
    residuals: float = 0.0


def training_overrides(family: str, case: str) -> dict[str, Any]:
    """Solver values of a training case."""
    if case == "bounded":
        return {"max_iterations": 4, "phantom_steps": 1}
    if case == "pretrain":
        return {"gradient": "unrolled", "max_iterations": 4}
    if case == "nonconv":
        iterations, steps, tolerance = arrays(f"{family}_out")["nonconv/f_max_iter_grad_ftol"]
        return {"max_iterations": int(iterations), "phantom_steps": int(steps), "tolerance": float(tolerance)}
    return {}


def run_training_case(
    family: str, case: str, *, tensor_size: int = 1, sequence: bool = False, lm: Optional[PretrainedModel] = None
) -> CaseResult:
    """A training forward and backward pass against the goldens: logits, loss, every gradient, counts.

    ``lm`` is a golden model that was loaded otherwise; the case may change its parameters.
    """
    lm = (lm or golden_model(family, tensor=tensor_size, sequence=sequence)).train()
    lm.zero_grad()
    if case == "nonconv":
        scale_gains(lm, float(arrays(f"{family}_out")["nonconv/g_scale"]))
    golden = arrays(family)
    out = lm(torch.from_numpy(golden["input_ids"]), **training_overrides(family, case))
    loss = cross_entropy(out.logits, torch.from_numpy(golden["labels"]))
    loss.backward()
    sum_sequence_parallel_gradients(lm.model)
    gradients = gather_reference(lm.model, lambda parameter: parameter.grad)
    return compare_training_case(family, case, out.logits, float(loss.detach()), gradients, out.trace)


def compare_training_case(
    family: str, case: str, logits: torch.Tensor, loss: float, gradients: dict[str, torch.Tensor], trace: SolveTrace
) -> CaseResult:
    """How far a forward and backward pass is from the goldens; gradients under reference keys."""
    result = CaseResult(
        logits=float((logits - tensor(family, f"{case}/logits")).abs().max()),
        loss=abs(loss - float(tensor(family, f"{case}/loss"))),
    )
    _compare_gradients(result, family, case, gradients)
    if family in IMPLICIT and case != "pretrain":
        result.iterations = trace.iterations.tolist()
        result.evaluations = int(trace.evaluations.max())
        expected = tensor(family, f"{case}/rel_trace")
        result.residuals = float((trace.residuals - expected).abs().max())
    return result


def sum_sequence_parallel_gradients(model: torch.nn.Module) -> None:
    """What Megatron-Core's finalize_model_grads does for parameters that see only their rank's tokens."""
    group = model.decoder.tp_group
    for parameter in model.parameters():
        if group.size() > 1 and getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=group)


def scale_gains(model: torch.nn.Module, factor: float) -> None:
    """Scales the gains of the projections that the nonconv case scales."""
    scaled = ("linear_qkv", "linear_fc1", "in_proj")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight_g") and any(module in name for module in scaled):
                parameter.mul_(factor)


def _compare_gradients(result: CaseResult, family: str, case: str, gradients: dict[str, torch.Tensor]) -> None:
    whole = arrays(f"{family}_grads") if case == "train" else arrays(f"{family}_out")
    prefix = "grad/" if case == "train" else f"{case}/grad/"
    for key, gradient in gradients.items():
        if prefix + key in whole:
            expected = torch.from_numpy(whole[prefix + key])
            result.gradients[key] = float((gradient - expected).norm() / expected.norm())
        norm = float(arrays(f"{family}_out")[f"{case}/gradnorm/{key}"])
        result.gradients[f"norm of {key}"] = abs(float(gradient.norm()) / norm - 1)
    total = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
    result.gradient_norm = abs(float(total) / float(tensor(family, f"{case}/grad_norm_total")) - 1)


def run_inference_case(
    family: str, case: str, *, tensor_size: int = 1, lm: Optional[PretrainedModel] = None
) -> dict[str, Any]:
    """An eval or sequential forward pass with the reference's batch norm: distance and step counts."""
    lm = (lm or golden_model(family, tensor=tensor_size)).eval()
    ids = torch.from_numpy(arrays(family)["input_ids"])
    out = lm(ids, mode="simultaneous" if case == "eval" else "sequential", residual_norm="batch")
    return compare_inference_case(family, case, out.logits, out.trace)


def compare_inference_case(family: str, case: str, logits: torch.Tensor, trace: SolveTrace) -> dict[str, Any]:
    """How far a forward pass is from the goldens, and its step counts."""
    return {
        "logits": float((logits - tensor(family, f"{case}/logits")).abs().max()),
        "iterations": trace.iterations.tolist(),
        "evaluations": trace.evaluations.tolist(),
        "residuals": trace.residuals,
    }
