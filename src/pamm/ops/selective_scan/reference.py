"""The selective scan as its definition reads, one order and one position after another, in plain torch.

Every other engine is compared with this one. It is slow and keeps every state for the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    orders: Tensor,
    delta_bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    """Sum over the orders k of the recurrence along orders[k], put in place. Shapes: see `pamm.ops.selective_scan`.

    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t,   y_t = C_t·h_t + D x_t
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    per_order = delta.dim() == 5
    total = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for k, order in enumerate(orders):
        d, a, b, c, skip = (
            (delta[:, :, k], A[:, k], B[:, :, k], C[:, :, k], D[:, k]) if per_order else (delta, A, B, C, D)
        )
        d = d.to(dtype)
        if delta_bias is not None:
            bias = delta_bias[:, k] if per_order else delta_bias
            d = d + bias.to(dtype)[:, None, None, :]
        if softplus:
            d = F.softplus(d)
        u, d, b, c = (values.to(dtype)[:, :, order] for values in (x, d, b, c))
        y = _scan(u, d, a.to(dtype), b, c) + skip.to(dtype)[:, None, None, :] * u
        total = total + y[:, :, order.argsort()]
    return total.to(x.dtype)


def _scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One order. x, delta (G, B, L, D), A (G, D, N), B and C (G, B, L, N), all in visiting order → (G, B, L, D)."""
    h = x.new_zeros(*x.shape[:2], *A.shape[1:])  # (G, B, D, N)
    outputs = []
    for t in range(x.shape[2]):
        decay = torch.exp(delta[:, :, t, :, None] * A[:, None])
        h = decay * h + (delta[:, :, t] * x[:, :, t])[..., None] * B[:, :, t, None, :]
        outputs.append((h * C[:, :, t, None, :]).sum(-1))
    return torch.stack(outputs, dim=2)
