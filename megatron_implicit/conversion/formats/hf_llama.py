"""Llama as in transformers: its config.json and names.

Source: transformers, models/llama/{configuration,modeling}_llama.py; its rotary embedding rotates halves as ours does.
"""

from __future__ import annotations

from typing import Any

from megatron_implicit.config import Config, config_from_dict
from megatron_implicit.conversion.formats.naming import Naming
from megatron_implicit.conversion.stored import EMBEDDING
from megatron_implicit.errors import CheckpointError

LLAMA = Naming(
    whole={EMBEDDING: "model.embed_tokens.weight", "backbone.norm_f.weight": "model.norm.weight"},
    layers="model.layers.",
    inner={
        "norm.weight": "input_layernorm.weight",
        "mixer.wq.weight": "self_attn.q_proj.weight",
        "mixer.wk.weight": "self_attn.k_proj.weight",
        "mixer.wv.weight": "self_attn.v_proj.weight",
        "mixer.out_proj.weight": "self_attn.o_proj.weight",
        "norm2.weight": "post_attention_layernorm.weight",
        "mlp.w1.weight": "mlp.gate_proj.weight",
        "mlp.w3.weight": "mlp.up_proj.weight",
        "mlp.fc2.weight": "mlp.down_proj.weight",
    },
    head=("lm_head.weight",),
    aliases={},
    buffers=("rotary_emb.inv_freq",),
)
_BUILT = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None}


def config_from_llama(raw: dict[str, Any], source: str) -> Config:
    """Our configuration of a Llama's config.json.

    Raises:
        CheckpointError: a model we do not build; names the key.
    """
    for key, only in _BUILT.items():
        refuse_other(source, key, raw.get(key, only), only)
    try:
        heads, width = raw["num_attention_heads"], raw["hidden_size"]
        head = raw.get("head_dim") or width // heads
        if head * heads != width:
            only = f"hidden_size / num_attention_heads = {width // heads}"
            raise CheckpointError(f"{source}: head_dim={head} is not supported: only {only} is")
        model = {
            "family": "explicit_llama", "size": "custom", "num_layers": raw["num_hidden_layers"], "hidden_size": width,
            "vocab_size": raw["vocab_size"], "num_heads": heads,
            "num_query_groups": raw.get("num_key_value_heads") or heads, "ffn_size": raw["intermediate_size"],
            "rope_base": rope_base(raw, source), "norm_eps": raw.get("rms_norm_eps", 1e-6),
            "tie_embeddings": raw.get("tie_word_embeddings", False),
        }  # fmt: skip
    except KeyError as error:
        raise CheckpointError(f"{source}: config.json lacks {error.args[0]!r}") from None
    length = raw.get("max_position_embeddings", 2048)
    return config_from_dict(
        {"model": model, "data": {"sequence_length": length}, "train": {"steps": 1},
         "optimizer": {"learning_rate": 1e-3}}
    )  # fmt: skip


def rope_base(raw: dict[str, Any], source: str) -> float:
    """The base of the rotary embedding, by the present key (rope_parameters) or the older ones.

    Raises:
        CheckpointError: scaled frequencies.
    """
    parameters = raw.get("rope_parameters") or {}
    for values in (parameters, raw.get("rope_scaling") or {}):
        kind = values.get("rope_type", values.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{source}: rope_type={kind} is not supported: only unscaled rotary embeddings are")
    refuse_other(source, "partial_rotary_factor", parameters.get("partial_rotary_factor", 1.0), 1.0)
    return float(parameters.get("rope_theta", raw.get("rope_theta", 10000.0)))


def refuse_other(source: str, key: str, value: Any, only: Any) -> None:
    """Refuses a value that changes what a model computes.

    Raises:
        CheckpointError: it is not the one we build.
    """
    if value != only:
        raise CheckpointError(f"{source}: {key}={value} is not supported: only {only} is")


def llama_config(config: Config) -> dict[str, Any]:
    """config.json of an explicit Llama, with the older key of the rotary base and the present one."""
    model = config.model
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "hidden_act": "silu", "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size, "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_query_groups, "head_dim": model.hidden_size // model.num_heads,
        "max_position_embeddings": config.data.sequence_length, "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base, "rope_parameters": {"rope_theta": model.rope_base, "rope_type": "default"},
        "tie_word_embeddings": model.tie_embeddings, "initializer_range": 0.02, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None, "use_cache": True,
    }  # fmt: skip
