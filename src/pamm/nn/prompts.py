"""Prompts of the tasks beside the tokens of an image: what TaskPrompter's backbones share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


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
