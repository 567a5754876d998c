"""What stands around the bare recurrence, in torch, for engines that compute no more than that: bias, softplus, skip.

Such an engine's `scan(x, delta, A, B, C, orders, keep) -> (y, kept)` and
`scan_backward(dy, x, delta, A, B, C, orders, kept) -> (dx, ddelta, dA, dB, dC)` work in one dtype, with Δ itself as `delta`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    scan: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    orders: Tensor,
    softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """An engine's `forward` (see `pamm.ops.selective_scan`) from its bare one."""
    values = x.to(A.dtype)
    y, kept = scan(values, _steps(_shifted(delta, delta_bias), softplus), A, B, C, orders, keep)
    return y.addcmul_(values, _skip(D, delta, orders)).to(x.dtype), kept


def backward(
    scan_backward: Callable[..., tuple[Tensor, ...]],
    dy: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    orders: Tensor,
    softplus: bool,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    """An engine's `backward` from its bare one."""
    values, dy = x.to(A.dtype), dy.to(A.dtype)
    shifted = _shifted(delta, delta_bias)
    dx, ddelta, dA, dB, dC = scan_backward(dy, values, _steps(shifted, softplus), A, B, C, orders, kept)
    dx = torch.addcmul(dx, dy, _skip(D, delta, orders)).to(x.dtype)
    dD = (dy * values).sum((1, 2))
    dD = dD[:, None].expand_as(D).contiguous() if delta.dim() == 5 else dD * len(orders)
    if softplus:
        ddelta = ddelta * torch.sigmoid(shifted)
    ddelta_bias = ddelta.sum((1, -2))
    return dx, ddelta.to(delta.dtype), dA, dB, dC, dD, ddelta_bias


def _shifted(delta: Tensor, delta_bias: Tensor) -> Tensor:
    """The bias is per channel and, where delta has five axes, per order."""
    return delta.to(delta_bias.dtype) + delta_bias[:, None, ..., None, :]


def _steps(shifted: Tensor, softplus: bool) -> Tensor:
    return F.softplus(shifted) if softplus else shifted


def _skip(D: Tensor, delta: Tensor, orders: Tensor) -> Tensor:
    """Weight of x itself in the sum over the orders: (G, 1, 1, D)."""
    skip = D.sum(1) if delta.dim() == 5 else D * len(orders)
    return skip[:, None, None, :]
