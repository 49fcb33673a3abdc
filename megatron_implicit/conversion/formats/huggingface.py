"""``hf``: Llama and Mamba2 as transformers has them, and implicit models as a folder that brings its own code.

transformers has no architecture that iterates its layers, so an implicit model's lossless equivalent is a folder with
the modules of ``remote_code`` in it: ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable

from megatron_implicit.config import Config, config_from_dict, config_to_dict
from megatron_implicit.conversion.formats.hf_llama import LLAMA, config_from_llama, llama_config
from megatron_implicit.conversion.formats.hf_mamba2 import MAMBA2, config_from_mamba2, mamba2_config
from megatron_implicit.conversion.formats.naming import Naming
from megatron_implicit.conversion.formats.reference import describes
from megatron_implicit.conversion.stored import Origin, StoredModel, take_head
from megatron_implicit.conversion.tensor_files import open_tensor_files, peek_json, read_json
from megatron_implicit.conversion.tensor_writers import SHARD_BYTES, write_safetensors
from megatron_implicit.errors import CheckpointError, ConfigError

REMOTE_CODE = Path(__file__).parents[1] / "remote_code"
CODE_FILES = ("configuration_implicit_lm.py", "modeling_implicit_lm.py", "layers_implicit_lm.py")
"""The self-contained modules that a folder of an implicit model brings along."""
IMPLICIT = Naming(
    whole={}, layers="backbone.layers.", inner={}, head=("lm_head.weight",), aliases={},
    # transformers 4 takes weight_g and weight_v for torch's parametrization and loads them elsewhere.
    endings={"weight_g": "weight_gain", "weight_v": "weight_direction"},
)  # fmt: skip
_SECTIONS = ("model", "solver", "inference")


def recognises(folder: Path) -> bool:
    """A config.json with one of the model types below."""
    config = peek_json(folder / "config.json")
    return config.get("model_type") in _TYPES and "backbone_config" not in config


def open_folder(folder: Path) -> StoredModel:
    """Reads config.json and names the tensors; code in the folder is neither needed nor run."""
    raw = read_json(folder / "config.json")
    naming, config_of = _TYPES[raw["model_type"]][:2]
    try:
        config = config_of(raw, str(folder))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: config.json describes no model that can be built: {error}") from None
    tensors, head, unmapped = naming.to_reference(open_tensor_files(folder))
    unmapped |= take_head(tensors, head, config.model.tie_embeddings, str(folder), "tie_word_embeddings")
    return StoredModel(folder, "hf", config, tensors, Origin("hf", raw), unmapped)


def write_folder(model: StoredModel, folder: Path) -> None:
    """Writes config.json, safetensors (sharded from 5 GB on), and the code of an implicit model.

    Raises:
        CheckpointError: transformers computes something else than this model; names the key.
    """
    kind = "implicit_lm" if model.config.implicit else model.config.architecture
    naming, config_of, config_for = _TYPES[kind]
    values = model.origin.config if model.origin and model.origin.format == "hf" else None
    if values is None or values.get("model_type") != kind or not describes(config_of(values, "origin"), model.config):
        values = config_for(model.config)
    values |= {"dtype" if "dtype" in values else "torch_dtype": str(model.dtype)[6:]}
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_safetensors(folder, naming.entries(model), SHARD_BYTES)
    if model.config.implicit:
        for name in CODE_FILES:
            shutil.copyfile(REMOTE_CODE / name, folder / name)


def implicit_config(config: Config) -> dict[str, Any]:
    """config.json of an implicit model: our model, solver and inference sections, and where its code is."""
    values = config_to_dict(config)
    code = {"AutoConfig": "configuration_implicit_lm.ImplicitLMConfig",
            "AutoModelForCausalLM": "modeling_implicit_lm.ImplicitLMForCausalLM"}  # fmt: skip
    return {
        "architectures": ["ImplicitLMForCausalLM"], "auto_map": code, "model_type": "implicit_lm",
        "tie_word_embeddings": config.model.tie_embeddings, **{name: values[name] for name in _SECTIONS},
    }  # fmt: skip


def config_from_implicit(raw: dict[str, Any], source: str) -> Config:
    """Our configuration of such a config.json.

    Raises:
        CheckpointError, ConfigError: a section is missing or has an unknown key.
    """
    missing = [name for name in _SECTIONS if name not in raw]
    if missing:
        raise CheckpointError(f"{source}: config.json lacks {missing[0]!r}")
    sections = {name: raw[name] for name in _SECTIONS}
    return config_from_dict(sections | {"train": {"steps": 1}, "optimizer": {"learning_rate": 1e-3}})


_TYPES: dict[str, tuple[Naming, Callable[[dict, str], Config], Callable[[Config], dict]]] = {
    "llama": (LLAMA, config_from_llama, llama_config),
    "mamba2": (MAMBA2, config_from_mamba2, mamba2_config),
    "implicit_lm": (IMPLICIT, config_from_implicit, implicit_config),
}
"""model_type -> names of tensors, our configuration of config.json, config.json of our configuration."""
