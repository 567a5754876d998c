"""Replacing a network's modules by faster ones of the same parameters and names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import nn

from pamm.config.strict import ConfigError
from pamm.kernels import conv_head, head, matrix, mixed_convolution, winograd
from pamm.nn.replace import replace_modules
from pamm.ops.compiled import VARIABLE, Kernel

Choice = Literal["auto", "off"]
"""Values of `--kernels`: every rewrite that is worthwhile on this machine, or none."""


@dataclass(frozen=True)
class Rewrite:
    """A kind of module, and its faster replacement."""

    name: str
    """The computation."""
    how: str
    """How, and for which inputs. Others are left to torch, call by call."""
    replacement: Callable[[nn.Module], nn.Module | None]
    """A faster module in the state of the given one, or None for a module of another kind."""
    objection: Callable[[], str | None]
    """Why it is not worth while on this machine, or None."""
    kernel: Kernel
    """The C kernel; a rewrite without objection does without one in torch."""
    trains: bool = True
    """Whether it is also faster in training."""


REWRITES = (
    Rewrite(
        "heads",
        "3×3 convolution on the small map; on a CPU in float32 a C kernel, else torch",
        conv_head.replacement,
        lambda: None,
        head.KERNEL,
    ),
    Rewrite(
        "released experts",
        "folded into one convolution per image, on a CPU by a C kernel, else torch; without gradients",
        mixed_convolution.replacement,
        lambda: None,
        mixed_convolution.KERNEL,
        trains=False,
    ),
    Rewrite(
        "3×3 convolutions",
        f"Winograd's filtering by a C kernel; CPU, float32, {winograd.FEWEST_CHANNELS} channels and more",
        winograd.replacement,
        winograd.objection,
        winograd.KERNEL,
    ),
    Rewrite(
        "matrix products",
        "C kernel, all tasks in one call; CPU, float32",
        matrix.replacement,
        matrix.objection,
        matrix.KERNEL,
    ),
)
"""Every rewrite, in the order in which they are tried."""


@dataclass
class Report:
    """The replacements that `accelerate` made."""

    replaced: dict[str, list[str]] = field(default_factory=dict)
    """Name of the rewrite → names of the modules that were replaced."""
    left: dict[str, str] = field(default_factory=dict)
    """Name of the rewrite → why it replaced none."""

    def __str__(self) -> str:
        lines = [f"{name}: {len(names)} modules replaced" for name, names in self.replaced.items()]
        return "\n".join([*lines, *(f"{name}: left to torch ({reason})" for name, reason in self.left.items())])


def accelerate(model: nn.Module, *, training: bool, rewrites: Sequence[Rewrite] = REWRITES) -> Report:
    """Replace modules inside `model` by faster ones that hold the same parameters under the same names.

    The state dict, the optimizer's parameters and hooks stay as they are; results differ by rounding. A module of a
    subclass, which may compute something else, is not replaced. Call it before `model.compile()`. With PAMM_KERNELS=off it
    replaces nothing.

    Args:
        model: a network of this package, or any network with such modules inside. It is changed.
        training: whether it will be trained. Rewrites that only help without gradients are then worth it for the
            evaluations, and are applied as well; the report says so.
        rewrites: which to apply, by default all.

    Returns:
        What was replaced, and why the rest was not.
    """
    report = Report()
    for rewrite in rewrites:
        reason = f"switched off by {VARIABLE}=off" if os.environ.get(VARIABLE) == "off" else rewrite.objection()
        names = [] if reason else replace_modules(model, rewrite.replacement)
        if names:
            name = rewrite.name if rewrite.trains or not training else f"{rewrite.name} (in evaluations only)"
            report.replaced[name] = names
        else:
            report.left[rewrite.name] = reason or "no such module"
    return report


def apply_choice(model: nn.Module, kernels: Choice, *, training: bool) -> Report:
    """`accelerate` the network unless `kernels` is "off".

    Args:
        model: the network, which is changed.
        kernels: "auto" or "off".
        training: see `accelerate`.

    Returns:
        The replacements.

    Raises:
        ConfigError: another value of `kernels`.
    """
    if kernels not in get_args(Choice):
        raise ConfigError(f"kernels: found {kernels!r}, expected one of {', '.join(get_args(Choice))}")
    return accelerate(model, training=training) if kernels == "auto" else Report()
