"""Llama as in transformers: its config.json and names.

Source: transformers, models/llama/{configuration,modeling}_llama.py; its rotary embedding rotates halves as ours does.
"""

from __future__ import annotations

from typing import Any

from megatron_implicit.config import Config, config_from_dict
from megatron_implicit.conversion.formats.naming import Naming
from megatron_implicit.conversion.stored import EMBEDDING
from megatron_implicit.conversion.values import count, number, refuse_other, section
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
        CheckpointError: a model we do not build, or a value that is missing or wrong; names the key.
        ConfigError: values that do not fit each other.
    """
    for key, only in _BUILT.items():
        refuse_other(source, key, raw.get(key, only), only)
    heads, width = (count(raw, key, source) for key in ("num_attention_heads", "hidden_size"))
    head = count(raw, "head_dim", source, width // heads)
    if head != width // heads:
        only = f"hidden_size / num_attention_heads = {width // heads}"
        raise CheckpointError(f"{source}: head_dim={head} is not supported: only {only} is")
    model = {
        "family": "explicit_llama", "size": "custom", "num_layers": count(raw, "num_hidden_layers", source),
        "hidden_size": width, "vocab_size": count(raw, "vocab_size", source), "num_heads": heads,
        "num_query_groups": count(raw, "num_key_value_heads", source, heads),
        "ffn_size": count(raw, "intermediate_size", source), "rope_base": rope_base(raw, source),
        "norm_eps": number(raw, "rms_norm_eps", source, 1e-6), "tie_embeddings": raw.get("tie_word_embeddings", False),
    }  # fmt: skip
    length = count(raw, "max_position_embeddings", source, 2048)
    return config_from_dict(
        {"model": model, "data": {"sequence_length": length}, "train": {"steps": 1},
         "optimizer": {"learning_rate": 1e-3}}
    )  # fmt: skip


def rope_base(raw: dict[str, Any], source: str) -> float:
    """The base of the rotary embedding, by the present key (rope_parameters) or the older ones.

    Raises:
        CheckpointError: scaled frequencies, or a base that is no number.
    """
    parameters = section(raw, "rope_parameters", source)
    for values in (parameters, section(raw, "rope_scaling", source)):
        kind = values.get("rope_type", values.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{source}: rope_type={kind} is not supported: only unscaled rotary embeddings are")
    refuse_other(source, "partial_rotary_factor", parameters.get("partial_rotary_factor", 1.0), 1.0)
    return number(parameters if "rope_theta" in parameters else raw, "rope_theta", source, 10000.0)


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
