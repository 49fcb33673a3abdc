"""The reference's config.json of one of our configurations; the way back is in ``reference``.

Source of names and defaults: microsoft/implicit_languagemodels at 84a0bf3, as saved by transformers 4.51.3.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_implicit.config import Config
from megatron_implicit.errors import CheckpointError

_FIXED = {
    "norm_eps": (1e-5, "every norm has 1e-5"),
    "rope_base": (500000.0, "the rotary embedding has base 500000"),
}
"""Keys that the reference does not have: the value it computes with, in words for a message."""


def reference_config(config: Config) -> dict[str, Any]:
    """config.json as the reference writes it, with its defaults for what a model does not determine.

    Raises:
        CheckpointError: the reference computes something else than this model; names the key.
    """
    _refuse_what_it_cannot_say(config)
    model, mamba = config.model, config.architecture == "mamba2"
    values: dict[str, Any] = {
        "architectures": ["ImplicitMambaForCausalLM" if mamba else "ImplicitLlamaForCausalLM"],
        "average_eval": True,
        "backbone_config": _backbone(config),
        "backbone_type": "implicit" if config.implicit else "explicit",
        "d_embed": model.hidden_size,
        "data_info": {},
        "dataset_name": None,
        "deq_params": _solver(config) if config.implicit else {},
        "dropout": model.dropout,
        "emb_init_std": model.embedding_init_std,
        "head_bias": False,
        "keep_sequence_dim": False,
        "model_type": "implicit_mamba2" if mamba else "implicit_llama3",
        "pad_vocab": False,
        "pad_vocab_size_multiple": 8,
        "save_output_ids": False,
        "tie_embeddings": model.tie_embeddings,
        "tokenizer": "EleutherAI/gpt-neox-20b",
        "torch_dtype": "float32",
        "transformers_version": "4.51.3",
        "vocab_size": model.vocab_size,
        "weight_decay": 0.0,
    }
    if mamba:
        values |= {"load_from_pretrained_shell": False, "masked_training": False, "n_tokens": model.vocab_size}
    return values


def _refuse_what_it_cannot_say(config: Config) -> None:
    model = config.model
    for key, (value, words) in _FIXED.items():
        if getattr(model, key) != value:
            raise CheckpointError(f"model.{key}={getattr(model, key)} cannot be said in the format reference: {words}")
    if config.architecture == "llama" and model.num_query_groups != model.num_heads:
        raise CheckpointError(
            f"model.num_query_groups={model.num_query_groups} cannot be said in the format reference: its attention "
            "has a key and value for every head"
        )
    if config.implicit and (config.inference.tolerance, config.inference.damping) != (
        config.solver.tolerance,
        config.solver.phantom_damping,
    ):
        raise CheckpointError(
            f"inference.tolerance={config.inference.tolerance} and inference.damping={config.inference.damping} cannot "
            "be said in the format reference, which uses solver.tolerance and solver.phantom_damping: convert to hf"
        )


def _backbone(config: Config) -> dict[str, Any]:
    model = config.model
    values: dict[str, Any] = {
        "d_model": model.hidden_size, "dropout": model.dropout, "n_layer": model.num_layers, "pre_norm": True,
        "rms_norm": True,
    }  # fmt: skip
    if config.implicit:
        values |= {"init_gain": 0.5, "pretrain_iter": 4, "pretrain_steps": 0}
    if config.architecture == "mamba2":
        block = {"d_state": model.state_size, "expand": model.expand, "headdim": model.head_dim}
        defaults = {"ngroups": (model.num_groups, 1), "d_conv": (model.conv_width, 4),
                    "chunk_size": (model.scan_chunk_size, 256)}  # fmt: skip
        block |= {name: value for name, (value, default) in defaults.items() if value != default}
        return values | {"block_cfg": block, "block_type": "mamba2", "d_inner": 0}
    return values | {
        "block_cfg": {"n_head": model.num_heads}, "block_type": "transformer", "mlp_type": "llama_mlp",
        "d_inner": _inner_width(config),
    }  # fmt: skip


def _inner_width(config: Config) -> int:
    """The d_inner whose int(2 d_inner / 3) is the MLP's width; the paper's four times the width where that is one."""
    ffn = config.model.ffn_size
    candidates = [4 * config.model.hidden_size, math.ceil(3 * ffn / 2)]
    return next(inner for inner in candidates if int(2 * inner / 3) == ffn)


def _solver(config: Config) -> dict[str, Any]:
    solver, inference = config.solver, config.inference
    factor = inference.max_iterations == int(4.0 * solver.max_iterations)
    return {
        "norm": {
            "norm_clip": False, "norm_clip_val": 1.0, "norm_no_scale": False, "norm_target_norm": 1.0,
            "norm_type": "weight_norm", "sn_n_power_iters": 1,
        },
        "regularization": {
            "jac_incremental": 0, "jac_loss_freq": 0.0, "jac_loss_weight": 0.0, "sradius_mode": True,
        },
        "solver": {
            "b_max_iter": 32, "b_solver": "fixed_point_iter", "b_stop_mode": "rel", "b_tol": 0.001,
            "eval_f_max_iter": 0 if factor else inference.max_iterations, "eval_factor": 4.0,
            "f_max_iter": solver.max_iterations, "f_solver": "fixed_point_iter", "f_stop_mode": "rel",
            "f_tol": solver.tolerance,
        },
        "training": {
            "core": "sliced", "gamma": 0.8, "grad": solver.phantom_steps, "hook_ift": False, "ift": False,
            "indexing": [], "n_states": 1, "sup_gap": -1, "sup_loc": [], "tau": solver.phantom_damping,
        },
    }  # fmt: skip
