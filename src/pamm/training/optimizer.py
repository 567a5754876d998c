"""The optimizers, and the learning rate's schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pamm.config.experiment import TrainConfig

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over the parameters that are not frozen (`requires_grad`).

    Parameters marked `_no_weight_decay` (A_log, D, Δ's bias, priors) have no weight decay. If `backbone_lr_scale` is not 1, the
    backbone's parameters are separate groups with that `lr_scale`.

    The optimizer is fused: each step reads and writes a parameter once, without temporary copies. On a CPU, torch's fused
    kernels (2.15) expect a parameter, its gradient and its states to be contiguous in the same order. This function therefore
    makes parameters contiguous, and a hook does the same with gradients and states before they are used.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for scale in dict.fromkeys((1.0, config.backbone_lr_scale)):
        for exempt in (False, True):
            groups[exempt, scale] = {"params": [], "weight_decay": 0.0 if exempt else config.weight_decay}
            groups[exempt, scale] |= {} if scale == 1 else {"lr_scale": scale}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not parameter.permute(_memory_order(parameter)).is_contiguous():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        scale = config.backbone_lr_scale if name.startswith("backbone.") else 1.0
        groups[getattr(parameter, "_no_weight_decay", False), scale]["params"].append(parameter)
    optimizer = OPTIMIZERS[config.optimizer](list(groups.values()), lr=config.lr, fused=True)
    optimizer.register_step_pre_hook(_lay_out_gradients)
    optimizer.register_load_state_dict_post_hook(_lay_out_states)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> float:
    """Give every parameter group its learning rate of this step; returns that of the groups without a scale of their own."""
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return rate


def _lay_out_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for parameter in _parameters(optimizer):
        if parameter.grad is not None and _strides(parameter.grad) != _strides(parameter):
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)


def _lay_out_states(optimizer: torch.optim.Optimizer) -> None:
    for parameter in _parameters(optimizer):
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and _strides(value) != _strides(parameter):
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _strides(tensor: Tensor) -> list[int]:
    """Of the axes whose positions are more than one; the others say nothing of the layout."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _memory_order(tensor: Tensor) -> list[int]:
    """The axes, those whose neighbours lie farthest apart first."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Poly schedule lr·(1 − step/steps)^power, after a linear warm-up of `warmup` steps."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    return config.lr * warm * (1 - step / config.steps) ** config.power
