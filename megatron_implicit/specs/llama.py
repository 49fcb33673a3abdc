"""Llama layers for Megatron-Core's TransformerBlock."""

from __future__ import annotations

from megatron_implicit.layers.attention import CausalCoreAttention
from megatron_implicit.layers.linear import ColumnShardedLinear, SectionedLinear
from megatron_implicit.layers.norms import RMSNorm
from megatron_implicit.layers.recompute import RecomputedTransformerLayer
from megatron_implicit.layers.residual import residual_add
from megatron_implicit.layers.stack_config import StackConfig

from megatron.core.transformer import ModuleSpec  # isort: skip
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # isort: skip
from megatron.core.transformer.enums import AttnMaskType  # isort: skip
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # isort: skip
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # isort: skip
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules  # isort: skip


def llama_block_spec(config: StackConfig, layers: int) -> TransformerBlockSubmodules:
    """Pre-norm layers of rotary attention and a gated MLP; the final norm belongs to F, not to the block.

    Args:
        config: of the whole stack.
        layers: of this pipeline stage.
    """
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ModuleSpec(SectionedLinear, params={"projection": "qkv", "injected": config.implicit}),
            core_attention=CausalCoreAttention,
            linear_proj=ColumnShardedLinear,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=ModuleSpec(SectionedLinear, params={"projection": "gated_mlp"}),
            linear_fc2=ColumnShardedLinear,
        ),
    )
    layer = ModuleSpec(
        module=RecomputedTransformerLayer if config.recompute == "layer" else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=residual_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=residual_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=None)
