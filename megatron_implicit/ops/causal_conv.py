"""The causal depthwise convolution with SiLU that Mamba2 applies to [x, B, C] (arXiv 2405.21060, figure 6)."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_implicit.device.kernels import find_kernels
from megatron_implicit.ops.precision import compute_dtype

# What the CUDA kernel was compiled for: it refuses other widths, and vectors of other than 8 channels.
_KERNEL_TAPS = (2, 3, 4)
_KERNEL_VECTOR = 8


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, *, state: Optional[Tensor] = None, lengths: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """silu(conv(x)), where position i of a channel sees positions i - k + 1 to i of that channel.

    Args:
        x: [b, s, c].
        weight: [c, k] taps; the last multiplies the position itself.
        bias: [c].
        state: [b, c, k - 1] the inputs before the first position, oldest first; None is zero.
        lengths: [b] positions of each sample that count, the rest being padding at the end; None counts all.

    Returns:
        The output [b, s, c] in x's dtype, computed in float32 (float64 if x is), and the state after the last
        position that counts [b, c, k - 1], a copy in x's dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    b, _, c = x.shape
    taps = weight.shape[-1]
    if weight.shape != (c, taps) or bias.shape != (c,) or (state is not None and state.shape != (b, c, taps - 1)):
        raise ValueError(
            "causal_conv1d takes x[b, s, c], weight[c, k], bias[c], state[b, c, k - 1]; got "
            f"x {list(x.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)}, "
            f"state {None if state is None else list(state.shape)}"
        )
    state = state if state is None else state.to(x.dtype)
    if x.shape[1] == 1 and state is not None and lengths is None:
        return _step(x, weight, bias, state)
    implementation = find_kernels(x.device.type).causal_conv
    if implementation == "causal_conv1d" and _kernel_takes(x, taps):
        y = _kernel_conv(x, weight, bias, state)
    else:
        # oneDNN has no float64 convolution, and torch's own works channel by channel.
        sums = _onednn_sums if implementation == "onednn" and x.dtype != torch.float64 else _shifted_sums
        dtype = compute_dtype(x)
        y = F.silu(sums(_with_history(x, state, taps).to(dtype), weight.to(dtype), bias.to(dtype))).to(x.dtype)
    return y, _next_state(x, state, taps, lengths)


def _step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position: a weighted sum, without the set-up that a convolution costs."""
    dtype = compute_dtype(x)
    seen = torch.cat([state, x.transpose(1, 2)], dim=2)
    y = torch.linalg.vecdot(seen.to(dtype), weight.to(dtype)) + bias.to(dtype)
    return F.silu(y).to(x.dtype).unsqueeze(1), seen[:, :, 1:].clone(memory_format=torch.contiguous_format)


def _with_history(x: Tensor, state: Optional[Tensor], taps: int) -> Tensor:
    """[b, k - 1 + s, c]: x after the inputs that came before it."""
    if state is None:
        return F.pad(x, (0, 0, taps - 1, 0))
    return torch.cat([state.transpose(1, 2), x], dim=1)


def _next_state(x: Tensor, state: Optional[Tensor], taps: int, lengths: Optional[Tensor]) -> Tensor:
    """[b, c, k - 1]: a copy, so that a state in a cache does not keep the whole input alive."""
    if lengths is not None:
        history = _with_history(x, state, taps)
        last = lengths[:, None] + torch.arange(taps - 1, device=x.device)  # the first of history are the old state's
        return history.gather(1, last[:, :, None].expand(-1, -1, x.shape[2])).transpose(1, 2).contiguous()
    history = x if x.shape[1] >= taps - 1 else _with_history(x, state, taps)
    return history[:, history.shape[1] - (taps - 1) :].transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _onednn_sums(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[b, k - 1 + s, c] -> [b, s, c] as a 2-D convolution over images of height 1 with channels last.

    oneDNN has a depthwise kernel for those and none for conv1d: measured 2 to 3 times faster than the sums below.
    """
    images = inputs.transpose(1, 2).unsqueeze(2)
    sums = F.conv2d(images, weight[:, None, None, :], bias, groups=weight.shape[0])
    return sums.squeeze(2).transpose(1, 2)


def _shifted_sums(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[b, k - 1 + s, c] -> [b, s, c] as one multiply-add for each tap."""
    taps = weight.shape[1]
    length = inputs.shape[1] - (taps - 1)
    sums = bias
    for tap in range(taps):
        sums = torch.addcmul(sums, inputs[:, tap : tap + length], weight[:, tap])
    return sums


def _kernel_takes(x: Tensor, taps: int) -> bool:
    _, s, c = x.shape
    return taps in _KERNEL_TAPS and c % _KERNEL_VECTOR == 0 and s > 1 and x.dtype != torch.float64


def _kernel_conv(x: Tensor, weight: Tensor, bias: Tensor, state: Optional[Tensor]) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    if x.stride(2) != 1 or x.stride(0) % _KERNEL_VECTOR or x.stride(1) % _KERNEL_VECTOR:
        x = x.clone(memory_format=torch.contiguous_format)
    if state is not None:
        state = state.transpose(1, 2).contiguous().transpose(1, 2)  # the kernel wants channels last here too
    y = causal_conv1d_fn(
        x.transpose(1, 2), weight.contiguous(), bias.to(weight.dtype), initial_states=state, activation="silu"
    )
    return y.transpose(1, 2)
