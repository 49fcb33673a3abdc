"""ModuleSpecs, as data: which modules Megatron-Core builds a stack of, for {implicit, explicit} x {mamba2, llama}.

The two kinds share their specs: implicit and explicit differ in StackConfig.implicit (weight norm, injection) and in
the decoder around the stack. May import what ``layers`` may, and ``layers``.
"""

from megatron_implicit.specs.llama import llama_block_spec
from megatron_implicit.specs.mamba2 import mamba2_layer_pattern, mamba2_stack_spec

__all__ = ["llama_block_spec", "mamba2_layer_pattern", "mamba2_stack_spec"]
