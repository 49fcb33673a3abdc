"""``reference``: the folder of the paper's public implementation; its names are the ones all formats meet in."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_implicit.config import Config
from megatron_implicit.conversion.formats.naming import Naming
from megatron_implicit.conversion.reference import config_from_reference, is_reference_folder
from megatron_implicit.conversion.reference_config import reference_config
from megatron_implicit.conversion.stored import Origin, StoredModel, take_head
from megatron_implicit.conversion.tensor_files import open_tensor_files, read_json
from megatron_implicit.conversion.tensor_writers import write_safetensors

NAMING = Naming(
    whole={}, layers="backbone.layers.", inner={}, head=("criterion.decoder.weight", "lm_head.weight"), aliases={}
)


def recognises(folder: Path) -> bool:
    """A config.json with a backbone_config."""
    return is_reference_folder(folder)


def open_folder(folder: Path) -> StoredModel:
    """Reads config.json and names the tensors."""
    raw = read_json(folder / "config.json")
    config = config_from_reference(raw, str(folder))
    tensors, head, unmapped = NAMING.to_reference(open_tensor_files(folder))
    unmapped |= take_head(tensors, head, config.model.tie_embeddings, str(folder), "tie_embeddings")
    return StoredModel(folder, "reference", config, tensors, Origin("reference", raw), unmapped)


def write_folder(model: StoredModel, folder: Path) -> None:
    """Writes config.json and one model.safetensors.

    Raises:
        CheckpointError: the format cannot say what this model is.
    """
    (folder / "config.json").write_text(json.dumps(_config(model), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_safetensors(folder, NAMING.entries(model))


def _config(model: StoredModel) -> dict:
    values = model.origin.config if model.origin and model.origin.format == "reference" else None
    if values is None or not describes(config_from_reference(values, "origin"), model.config):
        values = reference_config(model.config)
    return values | {"torch_dtype": str(model.dtype)[6:]}


def describes(config: Config, other: Config) -> bool:
    """Whether two configurations mean the same model and the same solves."""

    def meaning(each: Config) -> tuple:
        model = {name: value for name, value in vars(each.model).items() if name != "size"}
        return model, each.solver, each.inference

    return meaning(config) == meaning(other)
