"""The selective scan as its definition reads, one order and one position after another, in plain torch.

Every other engine is compared with this one. It is slow and keeps every state for the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pamm.ops.selective_scan.inputs import Inputs


def selective_scan(inputs: Inputs) -> Tensor:
    """Sum over the orders k of the recurrence along orders[k], put in place. Shapes: see `pamm.ops.selective_scan`.

    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t,   y_t = C_t·h_t + D x_t
    """
    x, delta, A, B, C, D, delta_bias, orders, softplus = inputs
    x, delta = x.to(A.dtype), delta.to(A.dtype)
    total = torch.zeros_like(x)
    for k, order in enumerate(orders):
        d, a, b, c, skip, bias = delta, A, B, C, D, delta_bias
        if delta.dim() == 5:
            d, a, b, c, skip, bias = delta[:, :, k], A[:, k], B[:, :, k], C[:, :, k], D[:, k], delta_bias[:, k]
        d = d + bias[:, None, None, :]
        if softplus:
            d = F.softplus(d)
        u, d, b, c = (values[:, :, order] for values in (x, d, b, c))
        y = _scan(u, d, a, b, c) + skip[:, None, None, :] * u
        total = total + y[:, :, order.argsort()]
    return total


def _scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One order. x, delta (G, B, L, D), A (G, D, N), B and C (G, B, L, N), all in visiting order → (G, B, L, D)."""
    h = x.new_zeros(*x.shape[:2], *A.shape[1:])  # (G, B, D, N)
    outputs = []
    for t in range(x.shape[2]):
        decay = torch.exp(delta[:, :, t, :, None] * A[:, None])
        h = decay * h + (delta[:, :, t] * x[:, :, t])[..., None] * B[:, :, t, None, :]
        outputs.append((h * C[:, :, t, None, :]).sum(-1))
    return torch.stack(outputs, dim=2)
