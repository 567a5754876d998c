"""The selective scan as a graph of plain torch operations: what `torch.export` and ONNX take, where a custom operator is opaque.

The sequence is cut in chunks of CHUNK positions. While exporting, the loop over chunks is one `scan` node (ONNX: Scan) whose
body is the recurrence of one chunk, so that the graph does not grow with the sequence; otherwise the loop is Python's, and
autograd goes through it. The recurrence itself is the definition's: no products or logarithms of decays, which overflow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pamm.ops.compiled import exporting
from pamm.ops.selective_scan.inputs import Inputs

RANK = 40

CHUNK = 8
"""Positions of one pass of the loop: enough that its overhead is small, few enough that the body stays small."""


def unavailable() -> str | None:
    """Why this form cannot run on this machine, or None."""
    return None


def refuses(device: str, dtype: torch.dtype) -> str | None:
    """Why this form does not take inputs on this kind of device and of this dtype, or None."""
    return None


def describe() -> str:
    return "plain torch without the custom operator; chosen by itself while a model is exported"


def selective_scan(inputs: Inputs) -> Tensor:
    """Sum over the orders of the recurrence along them, put in place. Shapes: see `pamm.ops.selective_scan`."""
    orders, per_order = inputs.orders, inputs.per_order()
    x, steps = inputs.x.to(inputs.A.dtype), inputs.steps()
    own_input = steps * (x[:, :, None] if per_order else x)
    visited = [_chunks(_visit(tensor, orders)) for tensor in (steps, own_input, inputs.B, inputs.C)]
    G, images, K, length, channels, N = inputs.sizes()
    state = x.new_zeros(G, images, K, N, channels)
    A = (inputs.A if per_order else inputs.A[:, None]).transpose(-1, -2)[:, None]  # (G, 1, 1 or K, N, D)
    # A in the state's whole shape: torch.onnx takes lengths for unknown, and an axis of unknown length does not broadcast.
    y = _loop(state, visited, A.expand_as(state).contiguous()).flatten(0, 1)[:length]  # (L, G, B, K, D)
    y = _visit(y.permute(1, 2, 3, 0, 4), orders.argsort(1)).sum(2)
    return y + x * inputs.skip()


def _visit(values: Tensor, orders: Tensor) -> Tensor:
    """(G, B, [K,] L, c) → (G, B, K, L, c), entry [k, t] from position orders[k, t]."""
    if values.dim() == 4:  # a place for each order's gradient: they are then summed in a fixed order
        values = values[:, :, None].expand(-1, -1, len(orders), -1, -1)
    return values[:, :, torch.arange(len(orders), device=orders.device)[:, None], orders]


def _chunks(values: Tensor) -> Tensor:
    """(G, B, K, L, c) → (chunks, CHUNK, G, B, K, c); zeros fill the last chunk and leave its state as it is."""
    values = F.pad(values, (0, 0, 0, -values.shape[3] % CHUNK))
    return values.permute(3, 0, 1, 2, 4).unflatten(0, (-1, CHUNK)).contiguous()


def _loop(state: Tensor, visited: list[Tensor], A: Tensor) -> Tensor:
    """Outputs of all chunks (chunks, CHUNK, G, B, K, D)."""

    def body(h: Tensor, chunk: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        delta, own_input, B, C = chunk
        decay = torch.exp(delta[..., None, :] * A)
        added = own_input[..., None, :] * B[..., None]
        states = []
        for t in range(CHUNK):
            h = decay[t] * h + added[t]
            states.append(h)
        # No matmul, which autocast would round in the backward pass.
        return h, (C[..., None] * torch.stack(states)).sum(-2)

    if exporting():
        from torch._higher_order_ops.scan import scan

        return scan(body, state, visited)[1]
    outputs = []
    for chunk in zip(*visited, strict=True):
        state, y = body(state, chunk)
        outputs.append(y)
    return torch.stack(outputs)
