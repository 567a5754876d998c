"""Layers with weights of their own for every task, applied to all tasks at once: the task is the leading axis."""

from __future__ import annotations

import math
from collections.abc import Callable, ItemsView, Sequence, ValuesView
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pamm.nn.joined import JoinedDropPath
from pamm.runtime.distributed import joined_draw

Part = TypeVar("Part", bound=nn.Module)

if TYPE_CHECKING:

    class PerTask(nn.ModuleDict, Generic[Part]):
        """A ModuleDict, for type checkers: of modules of one kind."""

        def __getitem__(self, key: str) -> Part: ...
        def values(self) -> ValuesView[Part]: ...
        def items(self) -> ItemsView[str, Part]: ...


def per_task(tasks: Sequence[str], build: Callable[[], Part]) -> PerTask[Part]:
    """One module of its own for every task."""
    return cast("PerTask[Part]", nn.ModuleDict({task: build() for task in tasks}))


class TaskLinear(nn.Module):
    """One linear map per task: (T, ..., i) → (T, ..., o). `weight` is (T, o, i), `bias` (T, 1, o) or None.

    Args:
        tasks: number of tasks T.
        in_features: input features i.
        out_features: output features o.
        bias: whether there is a bias.
    """

    def __init__(self, tasks: int, in_features: int, out_features: int, *, bias: bool = True):
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(tasks, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(tasks, 1, out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        rows, weight = x.flatten(1, -2), self.weight.mT
        y = torch.bmm(rows, weight) if self.bias is None else torch.baddbmm(self.bias.to(x.dtype), rows, weight)
        return y.unflatten(1, x.shape[1:-1])


class TaskLayerNorm(nn.Module):
    """One LayerNorm (ε 1e-5) per task: (T, ..., c) → (T, ..., c).

    Args:
        tasks: number of tasks T.
        channels: features c.
    """

    def __init__(self, tasks: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(tasks, channels))
        self.bias = nn.Parameter(torch.zeros(tasks, channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (len(x), *[1] * (x.dim() - 2), x.shape[-1])
        normal = F.layer_norm(x, x.shape[-1:])
        weight, bias = (p.view(shape).to(normal.dtype) for p in (self.weight, self.bias))
        return torch.addcmul(bias, normal, weight)


class TaskConv3x3(nn.Module):
    """One depthwise 3×3 convolution per task: (T, B, h, w, c) → (T, B, h, w, c).

    Args:
        tasks: number of tasks T.
        channels: channels c.
    """

    def __init__(self, tasks: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(tasks * channels, tasks * channels, 3, padding=1, groups=tasks * channels)

    def forward(self, x: Tensor) -> Tensor:
        maps = x.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)
        return self.conv(maps).unflatten(1, (len(x), -1)).permute(1, 0, 3, 4, 2)


class TaskDropPath(JoinedDropPath):
    """Stochastic depth, drawn for every task and image of the joined batch: (T, B, ...) → (T, B, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = joined_draw(lambda n: torch.rand(n, len(x), device=x.device) < keep, x.shape[1]).T.to(x.dtype) / keep
        return x * mask.view(*mask.shape, *[1] * (x.dim() - 2))
