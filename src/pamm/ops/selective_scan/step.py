"""The selective scan in torch, for any device: every group, image and order advances together, one step at a time.

The forward pass keeps the state at the start of every segment; the backward pass recomputes the states between.
Outputs return to their places by a gather through the inverse orders, so the result is the same bits every time.

Axes: T steps, K orders, G groups, B images, N states, D channels; channels are innermost, so that every operation runs
along contiguous memory.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from pamm.ops.selective_scan.inputs import Inputs

RANK = 30

SHORT_SEGMENT = 4
"""Steps computed together where no state is kept: few, so that they stay in the processor's cache."""


def segment_length(length: int) -> int:
    """Steps between two kept states: the least memory for length/s kept ones and three work buffers of s."""
    return max(1, isqrt(length // 3))


def unavailable() -> str | None:
    """Why this engine cannot run on this machine, or None."""
    return None


def refuses(device: str, dtype: torch.dtype) -> str | None:
    """Why this engine does not take inputs on this kind of device and of this dtype, or None."""
    return None


def describe() -> str:
    return "torch, one step at a time, states recomputed in the backward pass; any device"


def forward(inputs: Inputs, keep: bool) -> tuple[Tensor, Tensor]:
    """Contract: see `pamm.ops.selective_scan`."""
    length = inputs.x.shape[2]
    segment = segment_length(length) if keep else min(SHORT_SEGMENT, length)
    sequences = _Sequences(inputs, segment)
    states = kept(inputs, keep)
    h = states.new_zeros(sequences.state_shape)
    y = states.new_empty(length, *sequences.rows, inputs.x.shape[3])
    for start in range(0, length, segment):
        if keep:
            states[start // segment] = h
        steps = slice(start, start + segment)
        _, H = sequences.advance(h, steps)
        torch.matmul(sequences.take(sequences.C, steps)[..., None, :], H, out=y[steps].unsqueeze(-2))
        h.copy_(H[-1])
    y = sequences.restore(y, sum_orders=True)
    return y.addcmul_(inputs.x.to(y.dtype), inputs.skip()).to(inputs.x.dtype), states


def kept(inputs: Inputs, keep: bool) -> Tensor:
    """A tensor without values shaped like the states that `forward` keeps: (segments, K, G, B, N, D)."""
    G, images, K, length, channels, N = inputs.sizes()
    segments = -(-length // segment_length(length)) if keep else 0
    return inputs.A.new_empty(segments, K, G, images, N, channels)


def backward(dy: Tensor, inputs: Inputs, kept: Tensor) -> tuple[Tensor, ...]:
    """Contract: see `pamm.ops.selective_scan`."""
    dy = dy.to(inputs.A.dtype)
    dx, *others = _scan_backward(dy, inputs, kept)
    return inputs.gradients(dy, dx.addcmul_(dy, inputs.skip()), *others)


def _scan_backward(dy: Tensor, inputs: Inputs, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x without the skip, Δ, A, B and C from that of y, (G, B, L, D), and the kept states."""
    _, _, _, length, channels, size = inputs.sizes()
    s = _Sequences(inputs, segment_length(length))
    dy = s.by_position(dy)
    dx, ddelta = (dy.new_empty(length, *s.rows, channels) for _ in range(2))
    dB, dC = (dy.new_empty(length, *s.rows, size) for _ in range(2))
    dA = torch.zeros_like(s.A)
    g = dy.new_zeros(s.state_shape)  # gradient that reaches the last state of the segment from the segments after it
    G = dy.new_empty(s.segment, *s.state_shape)
    for start in reversed(range(0, length, s.segment)):
        steps = slice(start, start + s.segment)
        E, H = s.advance(states[start // s.segment], steps)
        xs, ds, Bs, Cs, dys = (s.take(values, steps) for values in (s.x, s.delta, s.B, s.C, dy))
        count = len(xs)
        dC[steps] = torch.matmul(H, dys[..., None]).squeeze(-1)
        torch.mul(Cs[..., None], dys[..., None, :], out=G[:count])
        G[count - 1] += g
        for t in reversed(range(1, count)):
            G[t - 1].addcmul_(G[t], E[t])
        torch.mul(G[0], E[0], out=g)
        dB[steps] = torch.matmul(G[:count], (ds * xs)[..., None]).squeeze(-1)
        du = torch.matmul(Bs[..., None, :], G[:count]).squeeze(-2)
        # From here E holds the gradient of the exponent Δ A: g_t · exp(Δ_t A) · h_{t−1}.
        E.mul_(G[:count])
        E[1:].mul_(H[:-1])
        E[0].mul_(states[start // s.segment])
        dx[steps] = du * ds
        dA += torch.mul(E, ds[..., None, :], out=G[:count]).sum(0).sum_to_size(dA.shape)
        ddelta[steps] = E.mul_(s.A).sum(-2).addcmul_(du, xs)
    shared = not inputs.per_order()
    return (
        s.restore(dx, sum_orders=True),
        s.restore(ddelta, sum_orders=shared),
        s.restore_A(dA),
        s.restore(dB, sum_orders=shared),
        s.restore(dC, sum_orders=shared),
    )


class _Sequences:
    """The inputs with their positions in front, read in visiting order a segment at a time."""

    def __init__(self, inputs: Inputs, segment: int):
        A, orders = inputs.A, inputs.orders
        G, images, K, *_ = inputs.sizes()
        self.per_order = inputs.per_order()
        self.orders = orders.T.contiguous()  # (L, K)
        self.inverse = orders.argsort(1).T.contiguous()
        self.columns = torch.arange(K, device=orders.device)
        self.rows = (K, G, images)
        varying = (inputs.x.to(A.dtype), inputs.steps(), inputs.B, inputs.C)
        self.x, self.delta, self.B, self.C = (self.by_position(values) for values in varying)
        # (1 or K, G, 1, N, D)
        self.A = (A.permute(1, 0, 3, 2) if self.per_order else A.transpose(1, 2)[None]).unsqueeze(2).contiguous()
        self.state_shape = (*self.rows, *self.A.shape[-2:])
        self.segment = segment
        self._E = A.new_empty(self.segment, *self.state_shape)
        self._H = torch.empty_like(self._E)

    def by_position(self, values: Tensor) -> Tensor:
        """(G, B, L, c) → (L, G, B, c), and (G, B, K, L, c) → (L, K, G, B, c)."""
        return (
            values.permute(2, 0, 1, 3).contiguous() if values.dim() == 4 else values.permute(3, 2, 0, 1, 4).contiguous()
        )

    def take(self, values: Tensor, steps: slice) -> Tensor:
        """The values that the orders visit at these steps: (T, K, G, B, c)."""
        index = self.orders[steps]
        return values[index] if values.dim() == 4 else values[index, self.columns]

    def advance(self, h: Tensor, steps: slice) -> tuple[Tensor, Tensor]:
        """From the state before `steps`: the decays exp(Δ A) and the states, both (T, K, G, B, N, D)."""
        x, delta, B = (self.take(values, steps) for values in (self.x, self.delta, self.B))
        E = torch.mul(delta[..., None, :], self.A, out=self._E[: len(x)]).exp_()
        H = torch.mul(B[..., None], (delta * x)[..., None, :], out=self._H[: len(x)])
        for t in range(len(x)):
            h = H[t].addcmul_(h, E[t])
        return E, H

    def restore(self, values: Tensor, sum_orders: bool) -> Tensor:
        """(L, K, G, B, c) in visiting order → (G, B, L, c), the sum over orders, or (G, B, K, L, c)."""
        placed = values[self.inverse, self.columns]
        return (
            placed.sum(1).permute(1, 2, 0, 3).contiguous() if sum_orders else placed.permute(2, 3, 1, 0, 4).contiguous()
        )

    def restore_A(self, values: Tensor) -> Tensor:
        """(1 or K, G, 1, N, D) → the shape of A."""
        values = values.squeeze(2)
        return values.permute(1, 0, 3, 2).contiguous() if self.per_order else values[0].transpose(1, 2).contiguous()
