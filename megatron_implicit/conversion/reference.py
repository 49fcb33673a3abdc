"""The paper's public format: its config.json as our configuration, its state-dict keys as slices of our parameters.

Source of names and meaning: microsoft/implicit_languagemodels at 84a0bf3.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Optional

import torch
from torch import Tensor, nn

from megatron_implicit.config import Config, config_from_dict
from megatron_implicit.conversion.values import count, number, refuse_other, section
from megatron_implicit.errors import CheckpointError
from megatron_implicit.layers.sections import Section, injection_projection, projection
from megatron_implicit.layers.sharding import Placement, placed_parameters
from megatron_implicit.models.initialisation import named_modules_globally

from megatron.core import parallel_state  # isort: skip

_LAYER = re.compile(r"^decoder\.map\.stack\.layers\.(\d+)\.(.+)$")
_DIRECT = {
    "embedding.word_embeddings.weight": "word_emb.emb.weight",
    "output_layer.weight": "word_emb.emb.weight",
    "decoder.injection_norm.weight": "backbone.injection_norm.weight",
    "decoder.map.final_norm.weight": "backbone.norm_f.weight",
}
_IN_LAYER = {
    "norm.weight": "norm.weight",
    "input_layernorm.weight": "norm.weight",
    "pre_mlp_layernorm.weight": "norm2.weight",
    "mixer.norm.weight": "mixer.norm.weight",
    "mixer.dt_bias": "mixer.dt_bias",
    "mixer.A_log": "mixer.A_log",
    "mixer.D": "mixer.D",
}
_MODULES_IN_LAYER = {
    "mixer.out_proj.columns": "mixer.out_proj",
    "self_attention.linear_proj.columns": "mixer.out_proj",
    "mlp.linear_fc2.columns": "mlp.fc2",
}
_SECTION = re.compile(r"^(.+?)(?:\.rows)?\.sections\.(\w+)$")
_MODULE_A_SECTION = {"self_attention.linear_qkv": "mixer.w{}", "mlp.linear_fc1": "mlp.{}"}
_ROWS_A_SECTION = {"mixer.in_proj": ("mixer.in_proj", "mamba_in"), "mixer.conv1d": ("mixer.conv1d", "mamba_conv")}
TIED_KEYS = ("criterion.decoder.weight", "lm_head.weight")
"""Keys that only repeat the embedding of a tied model."""


@dataclass(frozen=True)
class Slot:
    """One of our parameters as a slice of a reference tensor."""

    name: str
    """Name of the parameter in our model, layers numbered globally."""
    parameter: nn.Parameter
    key: str
    """Key in the reference's state dict."""
    rows: Optional[slice]
    """Rows of the reference tensor that the whole parameter covers; None means all."""
    placement: Optional[Placement]
    """This rank's slice of the whole parameter."""

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter, over all ranks."""
        shape = list(self.parameter.shape)
        if self.placement is not None:
            shape[self.placement.axis] = self.placement.partition.logical
        return tuple(shape)

    def pick(self, tensor: Tensor) -> Tensor:
        """This rank's part of a reference tensor, in our parameter's shape."""
        whole = tensor if self.rows is None else tensor[self.rows]
        if self.parameter.ndim == 1:
            whole = whole.reshape(-1)
        if self.placement is not None:
            part = self.placement.partition
            whole = whole.narrow(self.placement.axis, part.start, part.size)
        return whole


def reference_slots(model: nn.Module) -> list[Slot]:
    """Where each parameter of a model of ours sits in the reference's state dict."""
    return [
        Slot(name, parameter, *_reference_place(name, model), placement)
        for name, parameter, placement, _ in placed_parameters(named_modules_globally(model))
    ]


def _reference_place(name: str, model: nn.Module) -> tuple[str, Optional[slice]]:
    """(reference key, rows) of a parameter."""
    if name == "output_layer.weight" and not model.config.tie_embeddings:
        return "lm_head.weight", None
    if name in _DIRECT:
        return _DIRECT[name], None
    if name.startswith("decoder.injection.rows.sections."):
        section, leaf = name.split(".")[-2:]
        return f"backbone.injection.{leaf}", _rows_of(section, injection_projection(model.config).sections)
    match = _LAYER.match(name)
    if match is None:
        raise CheckpointError(f"parameter {name} has no counterpart in the reference format")
    layer, inner = f"backbone.layers.{match[1]}.", match[2]
    if inner in _IN_LAYER:
        return layer + _IN_LAYER[inner], None
    module, leaf = inner.rsplit(".", 1)
    if module in _MODULES_IN_LAYER:
        return f"{layer}{_MODULES_IN_LAYER[module]}.{leaf}", None
    owner, section = _SECTION.match(module).groups()
    if owner in _MODULE_A_SECTION:
        return f"{layer}{_MODULE_A_SECTION[owner].format(section)}.{leaf}", None
    target, rows_of = _ROWS_A_SECTION[owner]
    return f"{layer}{target}.{leaf}", _rows_of(section, projection(rows_of, model.config).sections)


def _rows_of(name: str, sections: tuple[Section, ...]) -> slice:
    start = 0
    for section in sections:
        if section.name == name:
            return slice(start, start + section.rows)
        start += section.rows
    raise KeyError(name)


def load_reference_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fills a model of ours, on any layout, from reference tensors.

    Raises:
        CheckpointError: keys are missing or left over, or a shape does not fit; named in one line.
    """
    slots = reference_slots(model)
    wanted = {key for keys in over_stages({slot.key for slot in slots}) for key in keys}
    missing = sorted(wanted - set(tensors))
    extra = sorted(set(tensors) - wanted - set(TIED_KEYS))
    if missing or extra:
        problem = f"lacks {_some(missing)}" if missing else f"has unexpected {_some(extra)}"
        raise CheckpointError(f"{source} {problem}: it does not hold the model its config.json describes")
    rows: dict[str, int] = {}
    for slot in slots:
        if slot.rows is not None:
            rows[slot.key] = max(rows.get(slot.key, 0), slot.rows.stop)
    with torch.no_grad():
        for slot in slots:
            _copy(slot, tensors[slot.key], rows.get(slot.key), source)


def _copy(slot: Slot, tensor: Tensor, rows: Optional[int], source: str) -> None:
    """``rows``: of the whole reference tensor, where our parameter is a block of them."""
    whole = tensor if slot.rows is None else tensor[slot.rows]
    if math.prod(whole.shape) != math.prod(slot.whole_shape) or tensor.shape[0] != (rows or slot.whole_shape[0]):
        raise CheckpointError(
            f"{source}: {slot.key} has shape {tuple(tensor.shape)}, which does not fit the config.json beside it "
            f"(parameter {slot.name} needs {tuple(slot.whole_shape)} of it)"
        )
    slot.parameter.copy_(slot.pick(tensor))


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def over_stages(value: Any) -> list[Any]:
    """What every pipeline stage has, in their order; every rank must call it."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return [value]
    gathered: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(gathered, value, group=group)
    return gathered


def gather_reference(
    model: nn.Module, value: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.detach()
) -> dict[str, Tensor]:
    """Whole tensors under the reference's keys, gathered over tensor group and stages; every rank must call it.

    Args:
        model: a model of ours.
        value: what to gather of each parameter: itself, or for example its gradient.
    """
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for slot in reference_slots(model):
        whole = _gather(value(slot.parameter), slot.placement, model.decoder.tp_group)
        pieces.setdefault(slot.key, []).append((slot.rows.start if slot.rows else 0, whole))
    local = {
        key: _as_reference(key, torch.cat([t for _, t in sorted(parts, key=lambda p: p[0])]))
        for key, parts in pieces.items()
    }
    return {key: tensor for stage in reversed(over_stages(local)) for key, tensor in stage.items()}  # first copies win


def _gather(local: Tensor, placement: Optional[Placement], group: Any) -> Tensor:
    if placement is None or placement.partition.ranks == 1:
        return local
    part, axis = placement.partition, placement.axis
    padding = [0, 0] * (local.ndim - axis - 1) + [0, part.computed - part.size]
    padded = torch.nn.functional.pad(local, padding).contiguous()
    shards = [torch.empty_like(padded) for _ in range(part.ranks)]
    torch.distributed.all_gather(shards, padded, group=group)
    return torch.cat(shards, dim=axis).narrow(axis, 0, part.logical)


def _as_reference(key: str, tensor: Tensor) -> Tensor:
    return tensor.view(reference_shape(key, tuple(tensor.shape)))


def reference_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The reference's shape of one of our tensors: gains are vectors here and columns there."""
    if not key.endswith("weight_g"):
        return shape
    return (shape[0], 1, 1) if "conv1d" in key else (shape[0], 1)


# ---------------------------------------------------------------- config.json


def config_from_reference(reference: dict[str, Any], source: str) -> Config:
    """Our configuration of a reference config.json; training sections keep their defaults.

    Raises:
        ConfigError, CheckpointError: a field is missing or wrong, or it is a model we do not build.
    """
    try:
        _refuse_other_models(reference, source)
        return config_from_dict(_sections_from_reference(reference, source))
    except KeyError as error:
        raise CheckpointError(f"{source}: config.json lacks {error.args[0]!r}") from None


_BLOCKS = {"mamba2": "mamba2", "transformer": "llama"}
_BUILT = (
    ("backbone_config", "pre_norm", True), ("backbone_config", "rms_norm", True),
    ("backbone_config", "mlp_type", "llama_mlp"), ("deq_params.norm", "norm_type", "weight_norm"),
    ("deq_params.norm", "norm_clip", False), ("deq_params.norm", "norm_no_scale", False), ("", "head_bias", False),
)  # fmt: skip
"""Section, key and the one value of it that we build."""


def _refuse_other_models(reference: dict[str, Any], source: str) -> None:
    for where, key, value in _BUILT:
        place = reference
        for name in filter(None, where.split(".")):
            place = section(place, name, source)
        refuse_other(source, f"{where}.{key}".lstrip("."), place.get(key, value), value)
    block = reference["backbone_config"]["block_type"]
    if str(block) not in _BLOCKS:
        raise CheckpointError(f"{source}: block_type={block} is not supported: only {', '.join(_BLOCKS)} are")


def _sections_from_reference(reference: dict[str, Any], source: str) -> dict[str, Any]:
    backbone = reference["backbone_config"]
    architecture = _BLOCKS[backbone["block_type"]]
    width, block = backbone["d_model"], section(backbone, "block_cfg", source)
    model: dict[str, Any] = {
        "family": f"{reference['backbone_type']}_{architecture}",
        "size": "custom",
        "num_layers": backbone["n_layer"],
        "hidden_size": width,
        "vocab_size": _padded_vocabulary(reference, source),
        "embedding_init_std": reference.get("emb_init_std", 0.01),
        "tie_embeddings": reference.get("tie_embeddings", True),
    }
    if architecture == "mamba2":
        model |= {
            "state_size": block.get("d_state", 128),
            "head_dim": block.get("headdim", 64),
            "expand": block.get("expand", 2),
            "num_groups": block.get("ngroups", 1),
            "conv_width": block.get("d_conv", 4),
            "scan_chunk_size": block.get("chunk_size", 256),
        }
    else:
        model |= {"num_heads": block["n_head"], "ffn_size": int(2 * count(backbone, "d_inner", source) / 3)}
    sections = {
        "model": model,
        "train": {"steps": 1},
        "optimizer": {"learning_rate": 1e-3},
    }
    if deq := section(reference, "deq_params", source):
        sections |= _solver_from_reference(deq, source)
    return sections


def _padded_vocabulary(reference: dict[str, Any], source: str) -> int:
    size = count(reference, "vocab_size", source)
    multiple = count(reference, "pad_vocab_size_multiple", source, 8) if reference.get("pad_vocab") else 1
    return -(-size // multiple) * multiple


def _solver_from_reference(deq: dict[str, Any], source: str) -> dict[str, Any]:
    solver, training = section(deq, "solver", source), section(deq, "training", source)
    iterations = count(solver, "f_max_iter", source)
    evaluation = int(number(solver, "eval_f_max_iter", source, 0))
    return {
        "solver": {
            "max_iterations": iterations,
            "tolerance": solver["f_tol"],
            "phantom_steps": training["grad"],
            "phantom_damping": training["tau"],
        },
        "inference": {
            "max_iterations": evaluation if evaluation > 0 else int(iterations * number(solver, "eval_factor", source, 4.0)),
        },
    }


# ---------------------------------------------------------------- folders


def is_reference_folder(path: Path) -> bool:
    """Whether a folder holds a reference config.json."""
    config = path / "config.json"
    return config.is_file() and "backbone_config" in config.read_text(encoding="utf-8", errors="replace")
