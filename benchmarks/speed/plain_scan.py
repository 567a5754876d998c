"""Plain forms of the selective scan: the published reference recurrence, mamba.py's parallel scan, and an adapter.

All are functions of one task's tensors laid out channel by channel, as the Mamba papers write them:

    x, delta (B, D, L)   A (D, N)   B, C (B, N, L)   D, bias (D,)   orders (K, L) int64   →  y (B, D, L)

or, where every order has parameters of its own, delta (B, K, D, L), A (K, D, N), B, C (B, K, N, L), D, bias (K, D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pamm.ops import selective_scan

Scan = Callable[["Parts", Tensor], Tensor]
"""Function of the tensors above and the orders."""


class Parts(NamedTuple):
    """The inputs of a scan, see the top of this file."""

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    bias: Tensor

    def each(self, orders: Tensor) -> Iterator[tuple[Parts, Tensor]]:
        """For every order: a copy of the inputs as it visits the positions, and the order."""
        for k, order in enumerate(orders):
            delta, A, B, C, D, bias = self[1:]
            if delta.dim() == 4:
                delta, A, B, C, D, bias = delta[:, k], A[k], B[:, k], C[:, k], D[k], bias[k]
            moved = (values[..., order] for values in (self.x, delta, B, C))
            x, delta, B, C = moved
            yield Parts(x, delta, A, B, C, D, bias), order


def recurrence(parts: Parts) -> Tensor:
    """One order: the reference recurrence as published, one position after another over a state (B, D, N)."""
    x, delta, A, B, C, D, bias = (values.float() for values in parts)
    delta = F.softplus(delta + bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    drive = torch.einsum("bdl,bnl,bdl->bdln", delta, B, x)
    state = x.new_zeros(len(x), *A.shape)
    outputs = []
    for t in range(x.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
    return torch.stack(outputs, dim=2) + x * D[:, None]


def mambapy(parts: Parts) -> Tensor:
    """One order, by the parallel scan of the library mambapy (mamba.py), in its own layout (B, L, D, N)."""
    from mambapy.pscan import pscan

    x, delta, A, B, C, D, bias = (values.float() for values in parts)
    x, delta, B, C = (values.transpose(1, 2) for values in (x, delta, B, C))
    delta = F.softplus(delta + bias)
    decay = torch.exp(delta[..., None] * A)
    drive = delta[..., None] * B[:, :, None] * x[..., None]
    return ((pscan(decay, drive) @ C[..., None]).squeeze(3) + D * x).transpose(1, 2)


def along_orders(one: Callable[[Parts], Tensor], parts: Parts, orders: Tensor) -> Tensor:
    """The sum over the orders of one plain scan each, on permuted copies, put back in place."""
    total = 0
    for moved, order in parts.each(orders):
        total = total + one(moved)[..., order.argsort()]
    return total.to(parts.x.dtype)


def recurrence_scan(parts: Parts, orders: Tensor) -> Tensor:
    """The published recurrence over all orders."""
    return along_orders(recurrence, parts, orders)


def engine_scan(parts: Parts, orders: Tensor) -> Tensor:
    """The same function by this package's engine."""
    x, delta, A, B, C, D, bias = parts
    x, delta, B, C = (values.transpose(-1, -2)[None] for values in (x, delta, B, C))
    return selective_scan(x, delta, A[None], B, C, D[None], orders, delta_bias=bias[None])[0].transpose(1, 2)


SCANS: dict[str, Scan] = {"recurrence": recurrence_scan, "engine": engine_scan}
"""What a plain network may scan with."""
