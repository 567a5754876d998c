"""The selective scan by an installed mamba-ssm: the CUDA kernel of Mamba's authors, one call for all groups, images and orders.

mamba-ssm's function scans (batch, channels, L) along L, with one A, D and bias for the whole batch, and with B and C common to
groups of channels. So groups (tasks) and orders become groups of channels here: G·K·D channels in G·K groups.
"""

from __future__ import annotations

import importlib
from functools import lru_cache

import torch
from torch import Tensor

from pamm.ops.selective_scan.inputs import Inputs

MOST_STATES = 256
"""The kernel's limit."""


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why this engine cannot run on this machine, or None."""
    if not torch.cuda.is_available():
        return "mamba-ssm's kernel needs a GPU, torch finds none here"
    try:
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except Exception as error:
        return f"mamba-ssm does not import ({type(error).__name__}: {error}); pip install mamba-ssm"
    return None


def refuses(device: str, dtype: torch.dtype) -> str | None:
    """Why this engine does not take inputs on this kind of device and of this dtype, or None."""
    if device != "cuda":
        return f"mamba-ssm's kernel runs on GPUs, the inputs are on {device}"
    if dtype == torch.float64:
        return "mamba-ssm's kernel computes in float32, the inputs are float64"
    return None


def describe() -> str:
    return "the CUDA kernel of an installed mamba-ssm"


def selective_scan(inputs: Inputs) -> Tensor:
    """Sum over the orders of the recurrence along them, put in place; B and C go in x's dtype. Shapes: see the package."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, delta, A, B, C, D, delta_bias, orders, softplus = inputs
    G, images, K, length, channels, N = inputs.sizes()
    if N > MOST_STATES:
        raise ValueError(f"state size {N}: mamba-ssm's kernel takes at most {MOST_STATES}; use engine='auto'")
    u, delta = (_visit(tensor.to(x.dtype), orders).flatten(1, 3) for tensor in (x, delta))  # (B, G·K·D, L)
    B, C = (_visit(tensor.to(x.dtype), orders).flatten(1, 2) for tensor in (B, C))  # (B, G·K, N, L)

    def of_channels(parameter: Tensor) -> Tensor:
        """(G, [K,] D, …) → (G·K·D, …) float32."""
        spread = parameter if inputs.per_order() else parameter[:, None].expand(G, K, *parameter.shape[1:])
        return spread.float().flatten(0, 2).contiguous()

    A, D, delta_bias = (of_channels(parameter) for parameter in (A, D, delta_bias))
    y = selective_scan_fn(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=softplus)
    y = y.view(images, G, K, channels, length)
    inverse = orders.argsort(1)[None, None, :, None].expand_as(y)
    return y.gather(-1, inverse).sum(2, dtype=torch.float32).permute(1, 0, 3, 2).to(x.dtype)


def _visit(values: Tensor, orders: Tensor) -> Tensor:
    """(G, B, [K,] L, c) → (B, G, K, c, L), entry t from position orders[k, t]."""
    own = torch.arange(len(orders), device=orders.device)[:, None]
    visited = values[:, :, orders] if values.dim() == 4 else values[:, :, own, orders]
    return visited.permute(1, 0, 2, 4, 3).contiguous()
