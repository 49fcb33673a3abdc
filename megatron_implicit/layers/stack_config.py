"""Megatron-Core's TransformerConfig with what our layers need on top."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_implicit.config import Config
from megatron_implicit.config.resolve import even_stages
from megatron_implicit.device import prepare_megatron

prepare_megatron()
from megatron.core.transformer import TransformerConfig  # noqa: E402


@dataclass(frozen=True)
class Stage:
    """A pipeline stage and the slice of the stack it holds. Without a pipeline there is one, first and last at once."""

    index: int
    count: int
    layers: range
    """Numbers of its layers in the whole stack, from 0."""

    @property
    def is_first(self) -> bool:
        """Has the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Has the final norm and the tied head."""
        return self.index == self.count - 1


@dataclass
class StackConfig(TransformerConfig):
    """Configuration of a stack F. ``ffn_hidden_size`` is the *computed* width, equal on all ranks."""

    implicit: bool = False
    """Weights are normed and the injection u is added to every in_proj / linear_qkv."""
    logical_ffn_size: int = 0
    """Llama: width of the MLP as checkpoints store it."""
    vocab_size: int = 0
    """Entries of the vocabulary as checkpoints store it."""
    embedding_init_std: float = 0.01
    """Standard deviation of the initial token embedding, and of an untied head."""
    tie_embeddings: bool = True
    """The output head is the token embedding."""
    rope_base: float = 500000.0
    """Base period of the rotary embedding."""
    conv_width: int = 4
    """Mamba2: taps of the causal convolution."""
    scan_chunk_size: int = 256
    """Mamba2: tokens of one block of the SSD scan."""
    recompute: Literal["none", "layer", "pass"] = "none"
    """What the backward pass recomputes."""
    layers_per_stage: list[int] = field(default_factory=list)
    """Layers of each pipeline stage."""
    has_cond_embedder: bool = True
    """Read by Megatron-Core: sum the gradients of parameters that every stage has a copy of."""

    def stage(self, group: dist.ProcessGroup) -> Stage:
        """This rank's stage.

        Args:
            group: the pipeline group.
        """
        before = sum(self.layers_per_stage[: group.rank()])
        return Stage(group.rank(), group.size(), range(before, before + self.layers_per_stage[group.rank()]))

    @property
    def mamba_inner_size(self) -> int:
        """Mamba2: inner width, over all heads."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mlps_per_layer(self) -> int:
        """Residual branches of a layer besides the mixer."""
        return 1 if self.logical_ffn_size else 0


def stack_config(config: Config) -> StackConfig:
    """Megatron-Core's configuration for a resolved run configuration with a known vocabulary."""
    from megatron_implicit.comm.partition import partition

    model, parallel = config.model, config.parallel
    layers_per_stage = parallel.layers_per_stage or even_stages(model.num_layers, parallel.pipeline)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    common = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_model_parallel_layout=_megatron_layout(layers_per_stage),
        layers_per_stage=layers_per_stage,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=torch.float32,
        bf16=dtype is torch.bfloat16,
        fp32_residual_connection=True,
        layernorm_epsilon=model.norm_eps,
        hidden_dropout=model.dropout,
        implicit=config.implicit,
        vocab_size=model.vocab_size,
        embedding_init_std=model.embedding_init_std,
        tie_embeddings=model.tie_embeddings,
        recompute=parallel.recompute,
        **_FIXED,
    )
    if config.architecture == "mamba2":
        heads = model.expand * model.hidden_size // model.head_dim
        return StackConfig(
            **common,
            num_attention_heads=heads,  # unused by Mamba layers, but validated by Megatron-Core
            mamba_num_heads=heads,
            mamba_head_dim=model.head_dim,
            mamba_state_dim=model.state_size,
            mamba_num_groups=model.num_groups,
            conv_width=model.conv_width,
            scan_chunk_size=model.scan_chunk_size,
        )
    computed = partition(model.ffn_size, parallel.tensor, 0, align=True).computed
    return StackConfig(
        **common,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=computed * parallel.tensor,
        logical_ffn_size=model.ffn_size,
        rope_base=model.rope_base,
        gated_linear_unit=True,
        activation_func=F.silu,
    )


def _megatron_layout(layers_per_stage: list[int]) -> Optional[list[list[str]]]:
    """Megatron-Core's description of an arbitrary split; it reads a layer's number from it."""
    if len(layers_per_stage) == 1:
        return None
    stages = [["decoder"] * layers for layers in layers_per_stage]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


_FIXED = dict(
    normalization="RMSNorm",
    add_bias_linear=False,
    attention_dropout=0.0,
    perform_initialization=False,  # models/initialisation.py draws every parameter, independently of the layout
    use_cpu_initialization=True,
    gradient_accumulation_fusion=False,  # effective weights are not leaves and have no main_grad
    bias_dropout_fusion=False,
    bias_activation_fusion=False,
    masked_softmax_fusion=False,
    apply_rope_fusion=False,
    persist_layer_norm=False,
    batch_p2p_sync=False,
    hetereogenous_dist_checkpoint=True,  # one key a layer, instead of one tensor over all layers
)
