"""``mamba_ssm``: folders of state-spaces/mamba2 models, config.json + pytorch_model.bin.

Source of names and meaning: state-spaces/mamba, models/config_mamba.py, models/mixer_seq_simple.py, modules/mamba2.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_implicit.config import Config, config_from_dict
from megatron_implicit.conversion.formats.naming import Naming
from megatron_implicit.conversion.formats.reference import describes
from megatron_implicit.conversion.stored import EMBEDDING, Origin, StoredModel, take_head
from megatron_implicit.conversion.tensor_files import open_tensor_files, peek_json, read_json
from megatron_implicit.conversion.tensor_writers import write_pickle
from megatron_implicit.conversion.values import count, refuse_other, section
from megatron_implicit.errors import CheckpointError

NAMING = Naming(
    whole={EMBEDDING: "backbone.embedding.weight"}, layers="backbone.layers.", inner={}, head=("lm_head.weight",),
    aliases={},
)  # fmt: skip
_EPSILON = 1e-5
_SHAPE = {"d_state": ("state_size", 128), "headdim": ("head_dim", 64), "ngroups": ("num_groups", 1),
          "expand": ("expand", 2), "d_conv": ("conv_width", 4), "chunk_size": ("scan_chunk_size", 256)}  # fmt: skip
"""Keys of ssm_cfg -> ours, and mamba_ssm's defaults."""
_BUILT = {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "bias": False, "conv_bias": True,
          "activation": "swish", "d_ssm": None}  # fmt: skip
"""Further keys of ssm_cfg with the one value that we build."""
_ONLY_INITIAL = {"layer", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "conv_init", "use_mem_eff_path"}


def recognises(folder: Path) -> bool:
    """A config.json with an ssm_cfg."""
    return "ssm_cfg" in peek_json(folder / "config.json")


def open_folder(folder: Path) -> StoredModel:
    """Reads config.json and names the tensors."""
    raw = read_json(folder / "config.json")
    config = config_from_mamba_ssm(raw, str(folder))
    tensors, head, unmapped = NAMING.to_reference(open_tensor_files(folder))
    unmapped |= take_head(tensors, head, config.model.tie_embeddings, str(folder), "tie_embeddings")
    return StoredModel(folder, "mamba_ssm", config, tensors, Origin("mamba_ssm", raw), unmapped)


def config_from_mamba_ssm(raw: dict[str, Any], source: str) -> Config:
    """Our configuration of a config.json.

    Raises:
        CheckpointError: a model that is not a plain Mamba2 stack; names the key.
    """
    cell = section(raw, "ssm_cfg", source)
    refuse_other(source, "ssm_cfg.layer", cell.get("layer", "Mamba1"), "Mamba2")
    for key, only in (("d_intermediate", 0), ("attn_layer_idx", []), ("rms_norm", True)):
        refuse_other(source, key, raw.get(key, only), only)
    for key, value in cell.items():
        if key in _BUILT:
            refuse_other(source, f"ssm_cfg.{key}", value, _BUILT[key])
        elif key == "dt_limit":
            refuse_other(source, "ssm_cfg.dt_limit", value, [0.0, float("inf")])
        elif key not in _SHAPE and key not in _ONLY_INITIAL:
            raise CheckpointError(f"{source}: ssm_cfg.{key}={value} is not supported: unknown to this converter")
    multiple = count(raw, "pad_vocab_size_multiple", source, 8)
    model = {
        "family": "explicit_mamba2", "size": "custom", "num_layers": count(raw, "n_layer", source),
        "hidden_size": count(raw, "d_model", source),
        "vocab_size": -(-count(raw, "vocab_size", source) // multiple) * multiple, "norm_eps": _EPSILON,
        "tie_embeddings": raw.get("tie_embeddings", True),
    }  # fmt: skip
    model |= {ours: count(cell, theirs, source, default) for theirs, (ours, default) in _SHAPE.items()}
    return config_from_dict({"model": model, "train": {"steps": 1}, "optimizer": {"learning_rate": 1e-3}})


def write_folder(model: StoredModel, folder: Path) -> None:
    """Writes config.json and pytorch_model.bin, the one file that mamba_ssm reads.

    Raises:
        CheckpointError: it is another kind of model.
    """
    config = model.config
    if config.model.family != "explicit_mamba2":
        raise CheckpointError(
            f"{config.model.family} cannot be said in the format mamba_ssm, which has explicit Mamba2 models only"
        )
    if config.model.norm_eps != _EPSILON:
        raise CheckpointError(
            f"model.norm_eps={config.model.norm_eps} cannot be said in the format mamba_ssm: every norm has {_EPSILON}"
        )
    (folder / "config.json").write_text(json.dumps(_config(model), indent=4) + "\n", encoding="utf-8")
    write_pickle(folder, NAMING.entries(model, repeated_head=True))


def _config(model: StoredModel) -> dict[str, Any]:
    if model.origin and model.origin.format == "mamba_ssm":
        if describes(config_from_mamba_ssm(model.origin.config, "origin"), model.config):
            return model.origin.config
    ours = model.config.model
    cell = {theirs: getattr(ours, name) for theirs, (name, default) in _SHAPE.items() if getattr(ours, name) != default}
    return {
        "d_model": ours.hidden_size, "d_intermediate": 0, "n_layer": ours.num_layers, "vocab_size": ours.vocab_size,
        "ssm_cfg": {"layer": "Mamba2", **cell}, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 1,
        "tie_embeddings": ours.tie_embeddings,
    }  # fmt: skip
