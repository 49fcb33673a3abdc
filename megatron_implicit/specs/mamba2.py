"""Mamba2 layers for Megatron-Core's MambaStack."""

from __future__ import annotations

from megatron_implicit.layers.mamba2_mixer import Mamba2Mixer
from megatron_implicit.layers.norms import RMSNorm
from megatron_implicit.layers.recompute import RecomputedMambaLayer
from megatron_implicit.layers.residual import residual_add
from megatron_implicit.layers.stack_config import StackConfig

from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules  # isort: skip
from megatron.core.transformer import ModuleSpec  # isort: skip
from megatron_implicit.device.megatron import accepted_arguments, mamba_stack_module  # isort: skip


_stack = mamba_stack_module()


class _StagedStack(_stack.MambaStack):
    """MambaStack with any split into stages; up to 0.17 upstream knows only special first and last stages."""

    def _select_layers_for_pipeline_parallel(self, layer_types: list[str]) -> tuple[int, list[str]]:
        layers = self.config.stage(self.pp_group).layers
        return layers.start, layer_types[layers.start : layers.stop]


def mamba2_layer_pattern(config: StackConfig) -> str:
    """Megatron-Core's pattern of layer types; since 0.18 it divides the layers into stages itself."""
    if hasattr(_stack.MambaStack, "_select_layers_for_pipeline_parallel"):
        return "M" * config.num_layers
    return "|".join("M" * layers for layers in config.layers_per_stage)


def mamba2_stack_spec(config: StackConfig) -> ModuleSpec:
    """Pre-norm Mamba2 layers on a float32 residual stream; the final norm belongs to F, not to the stack."""
    layer = ModuleSpec(
        module=RecomputedMambaLayer if config.recompute == "layer" else MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=RMSNorm, mixer=ModuleSpec(module=Mamba2Mixer), mamba_bda=residual_add
        ),
    )
    return ModuleSpec(
        module=_StagedStack,
        # Newer versions take the float32 residual from the configuration, where it is set too.
        params=accepted_arguments(_stack.MambaStack, post_layer_norm=False, residual_in_fp32=True),
        submodules=_stack.MambaStackSubmodules(mamba_layer=layer),
    )
