"""The optimizers, and the learning rate's schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pamm.experiment import TrainConfig


class InMemoryOrder:
    """For a torch optimizer: hands every parameter to the update with its axes as they lie in memory.

    An update is element by element, so their order does not matter; but torch's fused kernels on a CPU take three times as long
    over axes that are out of order (weights kept with the inputs of an output side by side), and mistake one element for another
    where a gradient or a state is laid out otherwise than its parameter (2.15). Such a tensor is laid out anew.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any, **options: Any) -> Any:
        found = super()._init_group(group, *lists, **options)
        parameters = list(lists[0])
        for members in lists:
            if isinstance(members, list) and [m.shape for m in members] == [p.shape for p in parameters]:
                members[:] = map(in_memory_order, members, parameters)
        return found


def in_memory_order(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A view of `tensor`, of a parameter's shape, with the axes in the order of the parameter's strides.

    If that is not contiguous, although the parameter is, the tensor's memory is replaced.
    """
    axes = memory_order(parameter)
    if parameter.permute(axes).is_contiguous() and not tensor.permute(axes).is_contiguous():
        tensor.data = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
    return tensor.permute(axes)


def memory_order(tensor: Tensor) -> list[int]:
    """The axes, those whose neighbours lie farthest apart first."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


class Adam(InMemoryOrder, torch.optim.Adam):
    """Adam with L2 decay."""


class AdamW(InMemoryOrder, torch.optim.AdamW):
    """Adam with decoupled decay."""


OPTIMIZERS = {"adam": Adam, "adamw": AdamW}


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over the parameters that are not frozen (`requires_grad`).

    No weight decay for parameters marked `_no_weight_decay` (A_log, D, Δ's bias, priors). Where `backbone_lr_scale` is not 1, the
    backbone's parameters are groups of their own, with that `lr_scale`.

    Fused: a parameter is read and written once a step, without temporary copies. torch's kernels take it for one piece of memory
    (2.15), and write past its end where it is not: a parameter with gaps, or with elements that share a place, is laid out anew.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for scale in dict.fromkeys((1.0, config.backbone_lr_scale)):
        for exempt in (False, True):
            groups[exempt, scale] = {"params": [], "weight_decay": 0.0 if exempt else config.weight_decay}
            groups[exempt, scale] |= {} if scale == 1 else {"lr_scale": scale}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not parameter.permute(memory_order(parameter)).is_contiguous():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        scale = config.backbone_lr_scale if name.startswith("backbone.") else 1.0
        groups[getattr(parameter, "_no_weight_decay", False), scale]["params"].append(parameter)
    return OPTIMIZERS[config.optimizer](list(groups.values()), lr=config.lr, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> float:
    """Give every parameter group its learning rate of this step; returns that of the groups without a scale of their own."""
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return rate


def learning_rate(config: TrainConfig, step: int) -> float:
    """Poly schedule lr·(1 − step/steps)^power, after a linear warm-up of `warmup` steps."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    return config.lr * warm * (1 - step / config.steps) ** config.power
