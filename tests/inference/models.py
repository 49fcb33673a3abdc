"""Small models of every kind, and the golden ones, for tests of inference."""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_implicit.api import PretrainedModel
from megatron_implicit.comm.groups import start_model_parallel
from megatron_implicit.config import config_from_dict
from megatron_implicit.models import build_model
from tests import goldens

VOCABULARY = 96
TIGHT = {"tolerance": 1e-6, "max_iterations": 100}
_GAINS = {"in_proj": 0.3, "linear_qkv": 0.3, "linear_fc1": 0.3, "out_proj": 4.0, "linear_proj": 4.0, "linear_fc2": 4.0}
"""As drawn, so narrow an F is hardly a contraction: it is made to depend more on u and less on z."""
_MAMBA2 = {"state_size": 16, "head_dim": 16, "scan_chunk_size": 32}
KINDS: dict[str, dict[str, Any]] = {
    "implicit_mamba2": _MAMBA2,
    "implicit_llama": {"num_heads": 4},
    "implicit_llama_grouped": {"num_heads": 4, "num_query_groups": 2},
    "explicit_mamba2": _MAMBA2,
    "explicit_llama_grouped": {"num_heads": 4, "num_query_groups": 1},
}
IMPLICIT = [kind for kind in KINDS if kind.startswith("implicit")]


@functools.lru_cache(maxsize=None)
def small_model(kind: str, layers: int = 1) -> PretrainedModel:
    """A freshly initialised model of width 32, in eval mode; F contracts about as fast as a trained one's."""
    model = {
        "family": kind.removesuffix("_grouped"), "size": "custom", "num_layers": layers, "hidden_size": 32,
        "vocab_size": VOCABULARY, "embedding_init_std": 0.2, **KINDS[kind],
    }  # fmt: skip
    config = config_from_dict(
        {"model": model, "train": {"steps": 1}, "optimizer": {"learning_rate": 1e-3}, "data": {"sequence_length": 32}}
    )
    start_model_parallel(config.parallel)
    lm = PretrainedModel(build_model(config), config).eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if name.endswith("weight_g"):
                parameter.mul_(next((gain for owner, gain in _GAINS.items() if f".{owner}." in name), 1.0))
    return lm


def tight(kind: str) -> dict[str, Any]:
    """Overrides for comparing modes: a solve at which rounding is all that is left."""
    return dict(TIGHT) if kind.startswith("implicit") else {}


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Tokens of ``small_model``."""
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@functools.lru_cache(maxsize=None)
def golden(family: str) -> PretrainedModel:
    """A golden model in eval mode."""
    return goldens.golden_model(family).eval()
