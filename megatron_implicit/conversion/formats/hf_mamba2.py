"""Mamba2 as in transformers: its config.json and names.

Source: transformers, models/mamba2/{configuration,modeling}_mamba2.py. The gate comes before the norm. From version 5
on the gated norm takes each group by itself, as the original and we do; version 4 took all groups together, so folders
with n_groups > 1 mean something else there.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_implicit.config import Config, config_from_dict
from megatron_implicit.conversion.formats.hf_llama import refuse_other
from megatron_implicit.conversion.formats.naming import Naming
from megatron_implicit.conversion.stored import EMBEDDING
from megatron_implicit.errors import CheckpointError

MAMBA2 = Naming(
    whole={EMBEDDING: "backbone.embeddings.weight"},
    layers="backbone.layers.",
    inner={},
    head=("lm_head.weight",),
    aliases={"backbone.embedding.weight": "backbone.embeddings.weight"},
)
_BUILT = {"use_bias": False, "use_conv_bias": True, "hidden_act": "silu", "rms_norm": True,
          "quantization_config": None}  # fmt: skip


def config_from_mamba2(raw: dict[str, Any], source: str) -> Config:
    """Our configuration of a Mamba2's config.json.

    Raises:
        CheckpointError: a model we do not build; names the key.
    """
    for key, only in _BUILT.items():
        refuse_other(source, key, raw.get(key, only), only)
    limit = [_number(value) for value in raw.get("time_step_limit", (0.0, math.inf))]
    refuse_other(source, "time_step_limit", limit, [0.0, math.inf])
    chunk = raw.get("chunk_size", 256)
    try:
        model = {
            "family": "explicit_mamba2", "size": "custom", "num_layers": raw["num_hidden_layers"],
            "hidden_size": raw["hidden_size"], "vocab_size": raw["vocab_size"], "state_size": raw["state_size"],
            "head_dim": raw["head_dim"], "expand": raw.get("expand", 2), "num_groups": raw.get("n_groups", 8),
            "conv_width": raw.get("conv_kernel", 4), "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
            "scan_chunk_size": chunk if chunk & (chunk - 1) == 0 else 256,
            "tie_embeddings": raw.get("tie_word_embeddings", False),
        }  # fmt: skip
    except KeyError as error:
        raise CheckpointError(f"{source}: config.json lacks {error.args[0]!r}") from None
    refuse_other(source, "num_heads", raw.get("num_heads"), model["expand"] * model["hidden_size"] // model["head_dim"])
    return config_from_dict({"model": model, "train": {"steps": 1}, "optimizer": {"learning_rate": 1e-3}})


def _number(value: Any) -> float:
    """A float, also as transformers writes infinity into JSON."""
    return float(value["__float__"]) if isinstance(value, dict) and "__float__" in value else float(value)


def mamba2_config(config: Config) -> dict[str, Any]:
    """config.json of an explicit Mamba2. Infinite limits are left out: they are the default, and JSON has no word for
    them."""
    model = config.model
    return {
        "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers, "state_size": model.state_size,
        "head_dim": model.head_dim, "num_heads": model.expand * model.hidden_size // model.head_dim,
        "expand": model.expand, "n_groups": model.num_groups, "conv_kernel": model.conv_width,
        "layer_norm_epsilon": model.norm_eps, "chunk_size": model.scan_chunk_size, "use_bias": False,
        "use_conv_bias": True, "hidden_act": "silu", "residual_in_fp32": True, "rms_norm": True,
        "tie_word_embeddings": model.tie_embeddings, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "use_cache": True,
    }  # fmt: skip
