"""Parameters of the selective state space model and their initialisation (Mamba), stacked over leading axes.

    A = −exp(A_log)      A_log (*lead, D, N)     log(1), …, log(N) in every channel
    D                    D     (*lead, D)        1
    Δ = softplus(W r + b)  W   (*lead, D, R)     uniform in ±R^(−1/2)
                           b   (*lead, D)        softplus(b) log-uniform in [1e-3, 1e-1]

`lead` is any shape, such as (tasks,) or (tasks, orders). A_log, D and b carry `_no_weight_decay = True`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def init_A_log(*lead: int, channels: int, state_size: int) -> nn.Parameter:
    """log(1..N) in every channel.

    Args:
        *lead: leading dimensions, e.g. (tasks,) or (tasks, orders).
        channels: channels D.
        state_size: state size N.

    Returns:
        (*lead, D, N) parameter without weight decay.
    """
    row = torch.arange(1, state_size + 1, dtype=torch.float32).log()
    return _undecayed(row.expand(*lead, channels, state_size).clone())


def init_D(*lead: int, channels: int) -> nn.Parameter:
    """The skip weight, 1 in every channel.

    Args:
        *lead: leading dimensions.
        channels: channels D.

    Returns:
        (*lead, D) parameter without weight decay.
    """
    return _undecayed(torch.ones(*lead, channels))


def init_delta_bias(*lead: int, channels: int, low: float = 1e-3, high: float = 1e-1) -> nn.Parameter:
    """Bias b with softplus(b) log-uniform.

    Args:
        *lead: leading dimensions.
        channels: channels D.
        low: smallest step, above 0.
        high: largest step.

    Returns:
        (*lead, D) parameter without weight decay.
    """
    delta = torch.empty(*lead, channels).uniform_(math.log(low), math.log(high)).exp_()
    return _undecayed(inverse_softplus(delta))


def init_delta_weight(*lead: int, channels: int, rank: int) -> nn.Parameter:
    """Projection of the Δ bottleneck, uniform in ±R^(−1/2).

    Args:
        *lead: leading dimensions.
        channels: channels D.
        rank: width R of the bottleneck.

    Returns:
        (*lead, D, R) parameter.
    """
    bound = rank**-0.5
    return nn.Parameter(torch.empty(*lead, channels, rank).uniform_(-bound, bound))


def inverse_softplus(value: Tensor) -> Tensor:
    """b with softplus(b) = value, for positive values; exact for small ones too."""
    return value + torch.log(-torch.expm1(-value))


def _undecayed(value: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue] (a mark that optimizers read)
    return parameter
