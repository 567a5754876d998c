"""Prompts of the tasks beside the tokens of an image: what TaskPrompter's backbones share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pamm.nn.router import resize_positions


class Level(NamedTuple):
    """What the backbone hands out for a level. Scores are products without scale or softmax."""

    x: Tensor
    """(B, C, h, w), the level's map."""
    spatial: Tensor
    """(B, H, T, h, w), the prompts' scores with the positions."""
    channel: Tensor
    """(B, T, C, m, m), the prompts' scores with the channels, by window."""
    cross: Tensor
    """(B, H, T, T), the prompts' scores with each other."""
    prompts: Tensor | None
    """(B, T, C) leaving; None for the ViT's last ones, which nothing reads."""


def init_prompts(tasks: int, channels: int) -> nn.Parameter:
    """(T, C), normal around 1 with deviation 1, cut to [−2, 2]."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(tasks, channels), mean=1.0, std=1.0, a=-2.0, b=2.0))


def prompt_linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer of the backbone: trunc-normal 0.02, bias 0."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def resize_spread(weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """What makes maps of positions from prompts, for another grid: the maps' sums over it keep their scale.

    Args:
        weight: (positions, ...) weights or biases.
        old: rows and columns of their grid.
        new: rows and columns of the new one.

    Returns:
        (new positions, ...).
    """
    rows = weight.float().reshape(old[0] * old[1], -1).T
    return _resized(rows, old, new).T.reshape(-1, *weight.shape[1:]).to(weight.dtype)


def resize_gather(weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """What makes prompts from such maps, for another grid: sums over maps that `resize_spread` made smaller.

    Args:
        weight: (C, positions) weights.
        old: rows and columns of their grid.
        new: rows and columns of the new one.

    Returns:
        (C, new positions).
    """
    share = new[0] * new[1] / (old[0] * old[1])
    return (share * _resized(weight.float(), old, new)).to(weight.dtype)


def resize_pixels(weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Weights of sums over a map, for a map of another size: the sums keep their scale.

    Args:
        weight: (n, positions) weights.
        old: rows and columns of their map.
        new: rows and columns of the new one.

    Returns:
        (n, new positions).
    """
    return _resized(weight.float(), old, new).to(weight.dtype)


def _resized(rows: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    return torch.stack([resize_positions(row, new) for row in rows.unflatten(1, old)]).flatten(1)
