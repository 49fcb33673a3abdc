"""The mathematics of a layer: one function each, a torch version beside the dispatch to a compiled kernel.

A function here takes and returns tensors: no parameters, no modules, no process groups (a reduction over a group
comes in as a callable). Which kernel runs is asked of ``device.kernels``, by the type of the tensors' device. The
torch versions are the reference and what a CPU runs; the tests hold the kernels against them. May import only
``config``, ``device`` and ``comm``.

Shapes use one legend: b batch, s sequence, t keys, h heads of the state space model, g groups of heads that share B
and C, p channels of a head, n state size (``ssd``) or attention heads (``attention``), m key-value heads, d channels
of an attention head, c channels, k taps of the convolution.
"""

from megatron_implicit.ops.attention import attention
from megatron_implicit.ops.causal_conv import causal_conv1d
from megatron_implicit.ops.norms import gated_rms_norm, rms_norm
from megatron_implicit.ops.ssd import ssd_scan, ssd_scan_sequential
from megatron_implicit.ops.weight_norm import weight_norm

__all__ = [
    "attention",
    "causal_conv1d",
    "gated_rms_norm",
    "rms_norm",
    "ssd_scan",
    "ssd_scan_sequential",
    "weight_norm",
]
