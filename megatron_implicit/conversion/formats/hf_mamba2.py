"""Mamba2 as in transformers: its config.json and names.

Source: transformers, models/mamba2/{configuration,modeling}_mamba2.py. The gate comes before the norm. From version 5
on the gated norm takes each group by itself, as the original and we do; version 4 took all groups together, so folders
with n_groups > 1 mean something else there.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_implicit.config import Config, config_from_dict
from megatron_implicit.conversion.formats.naming import Naming
from megatron_implicit.conversion.stored import EMBEDDING
from megatron_implicit.conversion.values import count, number, refuse_other

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
        CheckpointError: a model we do not build, or a value that is missing or wrong; names the key.
        ConfigError: values that do not fit each other.
    """
    for key, only in _BUILT.items():
        refuse_other(source, key, raw.get(key, only), only)
    limit = raw.get("time_step_limit", [0.0, math.inf])
    limit = [_untagged(value) for value in limit] if isinstance(limit, list) else limit
    refuse_other(source, "time_step_limit", limit, [0.0, math.inf])
    chunk = count(raw, "chunk_size", source, 256)
    width, head, expand = (
        count(raw, key, source, default) for key, default in (("hidden_size", None), ("head_dim", None), ("expand", 2))
    )
    refuse_other(source, "num_heads", count(raw, "num_heads", source), expand * width // head)
    model = {
        "family": "explicit_mamba2", "size": "custom", "num_layers": count(raw, "num_hidden_layers", source),
        "hidden_size": width, "vocab_size": count(raw, "vocab_size", source),
        "state_size": count(raw, "state_size", source), "head_dim": head, "expand": expand,
        "num_groups": count(raw, "n_groups", source, 8), "conv_width": count(raw, "conv_kernel", source, 4),
        "norm_eps": number(raw, "layer_norm_epsilon", source, 1e-5),
        "scan_chunk_size": chunk if chunk & (chunk - 1) == 0 else 256,
        "tie_embeddings": raw.get("tie_word_embeddings", False),
    }  # fmt: skip
    return config_from_dict({"model": model, "train": {"steps": 1}, "optimizer": {"learning_rate": 1e-3}})


def _untagged(value: Any) -> Any:
    """A number as it is, and infinity where transformers has written it as an object."""
    return math.inf if value in ({"__float__": "Infinity"}, {"__float__": math.inf}) else value


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
