"""Layers of the stack F of an implicit language model, in plain torch: Mamba2 and Llama, [batch, sequence, channels].

A layer takes the injection u and the state before its tokens, and returns its output and the state after them. Padded
tokens (``valid`` false) leave states alone and are seen by no other token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK = 64


class Tokens(NamedTuple):
    """What layers need to know of the tokens of a call."""

    positions: Tensor
    """[b, s], counted from each sample's first valid token."""
    valid: Optional[Tensor]
    """[b, s]; None where nothing is padded."""
    attends: Optional[Tensor]
    """[b, 1, s, t] which keys a query sees; None is causal without padding."""


class NormedWeight(nn.Module):
    """W = v · g / ‖v‖ by rows, direction v and gain g, with an optional bias."""

    def __init__(self, *shape: int, bias: bool = False) -> None:
        super().__init__()
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        self.weight_direction = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.weight_gain = nn.Parameter(self._norm().clone())
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None

    def _norm(self) -> Tensor:
        norm = torch.linalg.vector_norm(self.weight_direction.detach().flatten(1), dim=1, dtype=torch.float32)
        return norm.view(-1, *[1] * (self.weight_direction.ndim - 1))

    def effective(self) -> Tensor:
        """W, shaped and typed as v."""
        scale = self.weight_gain / self._norm().clamp_min(1e-30)
        return (self.weight_direction * scale).to(self.weight_direction.dtype)


Weights = dict[nn.Module, Tensor]


class RMSNorm(nn.Module):
    """x · rsqrt(mean x² + eps) · weight in float32; the result in the weight's dtype, or float32 if asked to."""

    def __init__(self, width: int, eps: float, float32: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.float32 = nn.Parameter(torch.ones(width)), eps, float32

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return normed if self.float32 else normed.to(self.weight.dtype)


class GatedGroupNorm(nn.Module):
    """RMSNorm of y · silu(gate) over each group of channels."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight, self.groups, self.eps = nn.Parameter(torch.ones(width)), groups, eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        values = (y.float() * F.silu(gate.float())).unflatten(-1, (self.groups, -1))
        normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps)
        return (normed.flatten(-2) * self.weight.float()).to(self.weight.dtype)


class Mamba2Mixer(nn.Module):
    """[z, x, B, C, dt] = in_proj(h) + u; causal convolution of [x, B, C]; state space; gated norm; out_proj."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        width, self.groups, self.taps = model["hidden_size"], model["num_groups"], model["conv_width"]
        self.inner, self.state_size = model["expand"] * width, model["state_size"]
        self.heads = self.inner // model["head_dim"]
        self.bc = self.groups * self.state_size
        channels = self.inner + 2 * self.bc
        self.in_proj = NormedWeight(self.inner + channels + self.heads, width)
        self.conv1d = NormedWeight(channels, 1, self.taps, bias=True)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedGroupNorm(self.inner, self.groups, model["norm_eps"])
        self.out_proj = NormedWeight(width, self.inner)

    @property
    def injected_rows(self) -> int:
        """Width of u."""
        return self.in_proj.weight_direction.shape[0]

    def forward(
        self, x: Tensor, u: Tensor, weights: Weights, state: Optional[tuple[Tensor, ...]], tokens: Tokens
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[b, s, h] -> ([b, s, h], (last convolution inputs, state of the state space))."""
        z, xbc, dt = (F.linear(x, weights[self.in_proj]) + u).split(
            [self.inner, self.inner + 2 * self.bc, self.heads], dim=-1
        )
        dt = F.softplus(dt.float() + self.dt_bias.float())
        if tokens.valid is not None:
            xbc, dt = xbc * tokens.valid[..., None], dt * tokens.valid[..., None]
        before, ssm = state if state is not None else (xbc.new_zeros(len(x), self.taps - 1, xbc.shape[-1]), None)
        xbc = torch.cat((before, xbc), dim=1)
        after = xbc[:, xbc.shape[1] - self.taps + 1 :]
        convolved = F.conv1d(
            xbc.transpose(1, 2), weights[self.conv1d], self.conv1d.bias.to(xbc.dtype), groups=xbc.shape[-1]
        )
        values, B, C = F.silu(convolved).transpose(1, 2).float().split([self.inner, self.bc, self.bc], dim=-1)
        y, ssm = state_space(
            values.unflatten(-1, (self.heads, -1)), dt, -torch.exp(self.A_log.float()),
            *(part.unflatten(-1, (self.groups, -1)) for part in (B, C)), ssm,
        )  # fmt: skip
        y = y + self.D.float()[:, None] * values.unflatten(-1, (self.heads, -1))
        return F.linear(self.norm(y.flatten(-2), z), weights[self.out_proj]), (after, ssm)


def state_space(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """h ← h · exp(dt A) + dt x ⊗ B, y = h · C, block by block in matrix form (arXiv 2405.21060, section 6).

    Args:
        x: [b, s, heads, p]; dt: [b, s, heads]; A: [heads]; B, C: [b, s, groups, n]; all float32.
        state: [b, heads, p, n] before the first token; None is zero.

    Returns:
        y [b, s, heads, p] and the state after the last token.
    """
    heads = x.shape[2]
    if state is None:
        state = x.new_zeros(len(x), heads, x.shape[-1], B.shape[-1])
    B, C = (part.repeat_interleave(heads // part.shape[2], dim=2) for part in (B, C))
    outputs = []
    for start in range(0, x.shape[1], _BLOCK):
        xs, dts, Bs, Cs = (part[:, start : start + _BLOCK] for part in (x, dt, B, C))
        decay = (dts * A).cumsum(1)
        between = decay[:, :, None] - decay[:, None]
        later = torch.ones(between.shape[1:3], dtype=torch.bool, device=x.device).triu(1)
        weights = between.masked_fill(later[None, :, :, None], float("-inf")).exp()
        weights = weights * torch.einsum("bihn,bjhn->bijh", Cs, Bs) * dts[:, None]
        inside = torch.einsum("bijh,bjhp->bihp", weights, xs)
        outputs.append(inside + torch.einsum("bihn,bhpn->bihp", Cs * decay.exp()[..., None], state))
        left = (decay[:, -1:] - decay).exp() * dts
        added = torch.einsum("bjhn,bjhp->bhpn", Bs * left[..., None], xs)
        state = state * decay[:, -1].exp()[..., None, None] + added
    return torch.cat(outputs, dim=1), state


class LlamaMixer(nn.Module):
    """Causal attention with rotary embedding; u is added to query, key and value before it."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        width, self.heads, self.groups = model["hidden_size"], model["num_heads"], model["num_query_groups"]
        self.head, self.base = width // self.heads, model["rope_base"]
        rows = self.groups * self.head
        self.wq, self.wk, self.wv = (NormedWeight(each, width) for each in (width, rows, rows))
        self.out_proj = NormedWeight(width, width)

    @property
    def injected_rows(self) -> int:
        """Width of u."""
        return (self.heads + 2 * self.groups) * self.head

    def forward(
        self, x: Tensor, u: Tensor, weights: Weights, state: Optional[tuple[Tensor, ...]], tokens: Tokens
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[b, s, h] -> ([b, s, h], (keys, values), [b, groups, t, d])."""
        rows = [self.heads * self.head, self.groups * self.head, self.groups * self.head]
        q, k, v = (
            (F.linear(x, weights[matrix]) + part).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for matrix, part in zip((self.wq, self.wk, self.wv), u.split(rows, dim=-1))
        )
        q, k = rotated(q, tokens.positions, self.base), rotated(k, tokens.positions, self.base)
        if state is not None:
            k, v = torch.cat((state[0], k), dim=2), torch.cat((state[1], v), dim=2)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=tokens.attends, is_causal=tokens.attends is None, enable_gqa=self.groups < self.heads
        )
        return F.linear(y.transpose(1, 2).flatten(-2), weights[self.out_proj]), (k, v)


def rotated(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """The rotary embedding, halves rotated against each other: x [b, heads, s, d], positions [b, s]."""
    d = x.shape[-1]
    frequencies = base ** -(torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
    angles = positions[:, None, :, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class GatedMLP(nn.Module):
    """fc2(silu(w1 x) · w3 x)."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        width, ffn = model["hidden_size"], model["ffn_size"]
        self.w1, self.w3, self.fc2 = NormedWeight(ffn, width), NormedWeight(ffn, width), NormedWeight(width, ffn)

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        inner = F.silu(F.linear(x, weights[self.w1])) * F.linear(x, weights[self.w3])
        return F.linear(inner, weights[self.fc2])


class Layer(nn.Module):
    """z + mixer(norm(z), u), and for Llama + mlp(norm2(z)); the residual stream is float32."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        mamba = model["family"].endswith("mamba2")
        self.norm = RMSNorm(model["hidden_size"], model["norm_eps"])
        self.mixer = Mamba2Mixer(model) if mamba else LlamaMixer(model)
        if not mamba:
            self.norm2, self.mlp = RMSNorm(model["hidden_size"], model["norm_eps"]), GatedMLP(model)

    def forward(
        self, z: Tensor, u: Tensor, weights: Weights, state: Optional[tuple[Tensor, ...]], tokens: Tokens
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[b, s, h] float32 -> ([b, s, h] float32, state)."""
        mixed, state = self.mixer(self.norm(z), u, weights, state, tokens)
        z = z + mixed
        if hasattr(self, "mlp"):
            z = z + self.mlp(self.norm2(z), weights)
        return z, state
