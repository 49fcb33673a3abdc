"""The selective state space scan of Mamba2 ("state space duality", arXiv 2405.21060, section 6 and listing 1).

For every head, with a state h of shape [p, n]:

    h_i = exp(dt_i A) h_{i-1} + dt_i x_i ⊗ B_i        y_i = h_i C_i + D x_i

The torch version cuts the sequence into chunks. Inside a chunk the recurrence is a masked, decayed attention
(matrix products); between chunks it passes one state. Three things make it fast on a CPU core:

- B and C belong to a group of heads, so C Bᵀ, the states and their outputs are one product for each group, never
  repeated for its heads.
- Decays are powers of two of a base-2 sum: ``torch.exp2`` costs the same for any argument, while ``torch.exp`` on a
  CPU is 8 times slower at -inf (the masked half of every chunk) and 20 to 150 times slower where it underflows.
- The backward pass is written out and recomputes what it needs, so that only the inputs are saved.

Decays are exponentials of sums of dt A over the steps between two positions, masked before the exponential: with
A <= 0 and dt >= 0 none exceeds 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_implicit.device.kernels import find_kernels
from megatron_implicit.ops.precision import compute_dtype

_LOG2_E = math.log2(math.e)
# Work inside a chunk grows with its length, the states between chunks with their number. Measured on one CPU core for
# p of 32 and 64 and n of 32 to 128: 32 is best or close to it, 64 takes 1.2 to 1.7 and 128 3 to 5 times as long.
_LONGEST_TORCH_CHUNK = 32


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    *,
    chunk_size: int,
    initial_state: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """The scan, by mamba_ssm's Triton kernels where they are found, else in torch.

    Differentiable once; the torch version also in forward mode (torch.func.jvp), where no input requires gradient.

    Args:
        x: [b, s, h, p] inputs.
        dt: [b, s, h] step sizes, after softplus: >= 0.
        A: [h] decay rates, <= 0.
        B: [b, s, g, n] how inputs enter the state; head i reads group i // (h / g).
        C: [b, s, g, n] how the state is read.
        D: [h] weight of the skip connection, or None.
        chunk_size: positions of a chunk, at most. It changes speed, not the result; the kernels want a power of two
            (256 is theirs), the torch version never takes more than 32.
        initial_state: [b, h, p, n] state before the first position; None is zero.

    Returns:
        y [b, s, h, p] in x's dtype and the state after the last position [b, h, p, n]. Computed in float32, the state
        is float32 (float64 if x is).

    Raises:
        ValueError: shapes that do not fit together, or chunk_size < 1.
    """
    _check_shapes(x, dt, A, B, C, chunk_size)
    if x.shape[1] == 1:
        return _step(x, dt, A, B, C, D, initial_state)
    if find_kernels(x.device.type).ssd == "mamba_ssm" and x.dtype != torch.float64:
        return _triton_scan(x, dt, A, B, C, D, initial_state, chunk_size)
    chunk = min(chunk_size, _LONGEST_TORCH_CHUNK)
    inputs = (x, dt, A, B, C, D, initial_state)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _ChunkedScan.apply(*inputs, chunk)
    return _forward(*inputs, chunk)


def ssd_scan_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    *,
    initial_state: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence written down token by token: the oracle of the tests. Arguments and results as ssd_scan."""
    dtype = compute_dtype(x)
    heads_per_group = x.shape[2] // B.shape[2]
    xs, dt, A = x.to(dtype), dt.to(dtype), A.to(dtype)
    B = B.to(dtype).repeat_interleave(heads_per_group, dim=2)
    C = C.to(dtype).repeat_interleave(heads_per_group, dim=2)
    state = xs.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for i in range(x.shape[1]):
        decay = torch.exp(dt[:, i] * A)[..., None, None]
        state = decay * state + (dt[:, i, :, None] * xs[:, i])[..., None] * B[:, i, :, None, :]
        outputs.append((state * C[:, i, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * xs
    return y.to(x.dtype), state


def _check_shapes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> None:
    b, s, h, _ = x.shape
    fits = dt.shape == (b, s, h) and A.shape == (h,) and B.shape == C.shape and B.shape[:2] == (b, s)
    if not fits or s == 0 or h % B.shape[2]:
        raise ValueError(
            "ssd_scan takes x[b, s, h, p], dt[b, s, h], A[h] and B, C[b, s, g, n] with s > 0 and h a multiple of g; "
            f"got x {list(x.shape)}, dt {list(dt.shape)}, A {list(A.shape)}, B {list(B.shape)}, C {list(C.shape)}"
        )
    if chunk_size < 1:
        raise ValueError(f"ssd_scan's chunk_size is {chunk_size}; it must be at least 1")


def _triton_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], state: Optional[Tensor], chunk: int
) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D=D, initial_states=state, return_final_states=True)


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], state: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself, with the same arguments as _forward."""
    dtype = compute_dtype(x)
    (b, _, h, p), (g, n) = x.shape, B.shape[2:]
    xs, dt = x[:, 0].to(dtype), dt[:, 0].to(dtype)
    entering = (dt[..., None] * xs).view(b, g, -1, 1) * B.to(dtype).view(b, g, 1, n)
    entering = entering.view(b, h, p, n)
    if state is None:
        state = entering
    else:
        state = torch.addcmul(entering, state.to(dtype), torch.exp(dt * A.to(dtype))[..., None, None])
    y = (state.view(b, g, -1, n) @ C.to(dtype).view(b, g, n, 1)).view(b, h, p)
    if D is not None:
        y = y + D.to(dtype)[:, None] * xs
    return y.to(x.dtype).unsqueeze(1), state


class _ChunkedScan(torch.autograd.Function):
    """The chunked scan with a backward pass that saves the inputs only."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.chunk = inputs
        ctx.save_for_backward(*tensors)
        return _forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Optional[Tensor], ...]:
        tensors = ctx.saved_tensors
        gradients = _backward(*tensors, ctx.chunk, dy, dfinal)
        cast = (None if tensor is None else grad.to(tensor.dtype) for tensor, grad in zip(tensors, gradients))
        return *cast, None


@dataclass
class _Chunks:
    """The inputs by chunk, and what forward and backward pass both compute from them.

    Legend: c chunks, l positions of a chunk, r = h / g heads of a group; G = b·c·g matrices of a batched product.
    """

    x: Tensor
    """[b, c, l, h, p]"""
    dt: Tensor
    """[b, c, l, h]"""
    B: Tensor
    """[G, l, n]"""
    C: Tensor
    """[G, l, n]"""
    log_decay: Tensor
    """[b, c, l, h] base-2 logarithm of the decay from the chunk's start through each position."""
    from_start: Tensor
    """[b, c, l, h] that decay: what is left of the chunk's first state at each position."""
    to_end: Tensor
    """[b, c, l, h] what is left at the chunk's end of what entered at each position."""
    surviving: Tensor
    """[G, l, r·p] dt x to_end: what each position adds to the state at the chunk's end."""
    starts: Tensor
    """[b, c, h, p·n] state before each chunk."""
    final: Tensor
    """[b, h, p·n] state after the last chunk."""

    @property
    def groups(self) -> int:
        """g."""
        b, c = self.x.shape[:2]
        return self.B.shape[0] // (b * c)

    def by_group(self, heads: Tensor) -> Tensor:
        """[b, c, l, h, p] -> [G, l, r·p]."""
        return _by_group(heads, self.groups)

    def by_head(self, groups: Tensor) -> Tensor:
        """[G, l, r·p] -> [b, c, l, h, p]."""
        return groups.view(*self.x.shape[:2], self.groups, self.x.shape[2], -1).transpose(2, 3).reshape(self.x.shape)

    def states_by_group(self, states: Tensor) -> Tensor:
        """[b, c, h, p·n] -> [G, r·p, n]."""
        return states.reshape(self.B.shape[0], -1, self.B.shape[-1])


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    state: Optional[Tensor],
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The chunked scan, in operations torch can differentiate forward; arguments and results as ssd_scan."""
    (b, s, h, p), n = x.shape, B.shape[-1]
    chunks = _cut(x, dt, A, B, C, state, chunk)
    scores = _decays(chunks) * (chunks.C @ chunks.B.mT).unsqueeze(1)
    within = scores.flatten(0, 1) @ _head_matrices(chunks.x * chunks.dt.unsqueeze(-1))
    # In place, on memory just written: the order of y's channels is that of the product for a group.
    y = chunks.by_head(chunks.C @ chunks.states_by_group(chunks.starts).mT)
    y.mul_(chunks.from_start.unsqueeze(-1)).add_(within.view(*y.shape[:2], h, -1, p).transpose(2, 3))
    if D is not None:
        y.addcmul_(chunks.x, D.to(y.dtype)[:, None])
    return y.flatten(1, 2)[:, :s].to(x.dtype), chunks.final.view(b, h, p, n)


def _backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    state: Optional[Tensor],
    chunk: int,
    dy: Tensor,
    dfinal: Tensor,
) -> tuple[Optional[Tensor], ...]:
    """Gradients of the first seven arguments, given those of y and of the final state."""
    (b, s, h, p), (g, n) = x.shape, B.shape[2:]
    chunks = _cut(x, dt, A, B, C, state, chunk)
    dy = _chunked(dy.to(chunks.x.dtype), chunks.x.shape[1], chunks.x.shape[2])
    dx, dB, dC, dlog, dstate = _backward_between(chunks, dy, dfinal.flatten(2))
    dx_within, dB_within, dC_within, dlog_within = _backward_within(chunks, dy)
    dx.add_(dx_within)  # of dt x, so far
    dlog.add_(dlog_within)
    ddt = torch.linalg.vecdot(dx, chunks.x) + dlog * A.to(dlog.dtype)
    dA = (dlog * chunks.dt).sum((0, 1, 2))
    dx.mul_(chunks.dt.unsqueeze(-1))
    dD = None
    if D is not None:
        dx.addcmul_(dy, D.to(dy.dtype)[:, None])
        dD = (dy * chunks.x).sum((0, 1, 2, 4))
    dB, dC = (
        grad.view(b, -1, g, grad.shape[1], n).transpose(2, 3).reshape(b, -1, g, n)[:, :s]
        for grad in (dB.add_(dB_within), dC.add_(dC_within))
    )
    return dx.flatten(1, 2)[:, :s], ddt.flatten(1, 2)[:, :s], dA, dB, dC, dD, dstate.view(b, h, p, n)


def _backward_between(chunks: _Chunks, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient through the states that pass between chunks.

    dy is [b, c, l, h, p], dfinal [b, h, p·n]. Returns the gradients of dt x [b, c, l, h, p], of B and C [G, l, n], of
    the logarithm of every step's decay [b, c, l, h], and of the initial state [b, h, p·n].
    """
    read = chunks.by_group(dy * chunks.from_start.unsqueeze(-1))
    starts = chunks.states_by_group(chunks.starts)
    dC = read @ starts
    # The states' gradients follow the same recurrence as the states, from the last chunk to the first.
    dstarts = (read.mT @ chunks.C).view(chunks.starts.shape)
    total = chunks.from_start[:, :, -1]
    *later, dstate = _pass_states(dstarts.unbind(1)[::-1], total.unbind(1)[::-1], dfinal)
    dends = torch.stack(later[::-1], dim=1)
    dends_by_group = chunks.states_by_group(dends)
    dB = chunks.surviving @ dends_by_group
    dsurviving = chunks.B @ dends_by_group.mT
    # A step's decay acts on what it carries: what later positions read of the chunk's first state, what earlier
    # positions leave to its last, and the first state's share of the last. All terms add up without cancelling.
    reads = chunks.by_head(read * (chunks.C @ starts.mT)).sum(-1)
    leaves = chunks.by_head(dsurviving * chunks.surviving).sum(-1)
    dlog = reads.flip(2).cumsum(2).flip(2) + (leaves.cumsum(2) - leaves)
    dlog += (torch.linalg.vecdot(dends, chunks.starts) * total).unsqueeze(2)
    dx = chunks.by_head(dsurviving).mul_(chunks.to_end.unsqueeze(-1))
    return dx, dB, dC, dlog, dstate


def _backward_within(chunks: _Chunks, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient through the attention inside each chunk.

    dy is [b, c, l, h, p]. Returns the gradients of dt x [b, c, l, h, p], of B and C [G, l, n] and of the logarithm of
    every step's decay [b, c, l, h].
    """
    b, c, l, h, p = chunks.x.shape
    decays, products = _decays(chunks), (chunks.C @ chunks.B.mT).unsqueeze(1)
    dy = _head_matrices(dy)
    dx = ((decays * products).flatten(0, 1).mT @ dy).view(b, c, h, l, p).transpose(2, 3)
    dscores = (dy @ _head_matrices(chunks.x * chunks.dt.unsqueeze(-1)).mT).view(decays.shape)
    dproducts = dscores.mul_(decays).sum(1)
    dB, dC = dproducts.mT @ chunks.C, dproducts @ chunks.B
    # Step k's decay acts on every pair (i, j) with j < k <= i. Summing just those, not row sums minus column sums,
    # keeps the large pairs (i, i) out: 2 to 10 times less rounding in A's gradient where the decay is strong.
    flow = dscores.mul_(products).view(-1, l)
    before = flow.new_ones(l, l).triu_(1)
    dlog = (flow @ before).view(b, c, h, l, l).tril_().sum(-2).transpose(2, 3)
    return dx, dB, dC, dlog


def _cut(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Optional[Tensor], chunk: int) -> _Chunks:
    """Chunks of equal length, at most ``chunk``, and the states between them.

    The last chunk is filled up with dt = 0, which neither decays nor enters the state.
    """
    dtype = compute_dtype(x)
    (b, s, h, p), (g, n) = x.shape, B.shape[2:]
    c = math.ceil(s / chunk)
    l = math.ceil(s / c)
    x, dt, B, C = (_chunked(tensor.to(dtype), c, l) for tensor in (x, dt, B, C))
    B, C = _by_group(B, g), _by_group(C, g)
    log_decay = (dt * (A.to(dtype) * _LOG2_E)).cumsum(2)
    from_start = torch.exp2(log_decay)
    to_end = torch.exp2(log_decay[:, :, -1:] - log_decay)
    surviving = _by_group(x * (dt * to_end).unsqueeze(-1), g)
    added = (surviving.mT @ B).view(b, c, h, p * n)
    state = x.new_zeros(b, h, p * n) if state is None else state.to(dtype).reshape(b, h, p * n)
    *starts, final = _pass_states(added.unbind(1), from_start[:, :, -1].unbind(1), state)
    return _Chunks(x, dt, B, C, log_decay, from_start, to_end, surviving, torch.stack(starts, dim=1), final)


def _chunked(tensor: Tensor, c: int, l: int) -> Tensor:
    """[b, s, ...] -> [b, c, l, ...], filled up with zeros."""
    missing = c * l - tensor.shape[1]
    if missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
    return tensor.reshape(tensor.shape[0], c, l, *tensor.shape[2:])


def _by_group(tensor: Tensor, g: int) -> Tensor:
    """[b, c, l, h, p] -> [G, l, r·p]: three dimensions, so that bmm takes transposes by stride and copies nothing."""
    b, c, l = tensor.shape[:3]
    return tensor.reshape(b, c, l, g, -1).transpose(2, 3).reshape(b * c * g, l, -1)


def _head_matrices(tensor: Tensor) -> Tensor:
    """[b, c, l, h, p] -> [b·c·h, l, p]."""
    return tensor.transpose(2, 3).flatten(0, 2)


def _decays(chunks: _Chunks) -> Tensor:
    """[G, r, l, l]: what is left at position i of what entered at position j; zero for j > i."""
    b, c, l, h = chunks.log_decay.shape
    ends = chunks.log_decay.transpose(2, 3).reshape(-1, h // chunks.groups, l)
    future = ends.new_full((l, l), -math.inf).triu_(1)
    return (ends.unsqueeze(-1) - ends.unsqueeze(-2)).add_(future).exp2_()


def _pass_states(added: Sequence[Tensor], decays: Sequence[Tensor], state: Tensor) -> list[Tensor]:
    """The states before each chunk and after the last: [b, h, p·n] each.

    For every chunk, ``added`` has what it adds to the state [b, h, p·n] and ``decays`` the share it leaves of the
    state before it [b, h].
    """
    states = [state]
    for new, decay in zip(added, decays):
        states.append(torch.addcmul(new, states[-1], decay.unsqueeze(-1)))
    return states
