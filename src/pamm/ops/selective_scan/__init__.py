"""The selective scan over several scan orders, with engines for every machine.

An engine is a module; one that stands in this folder is found. It has

    RANK                                    of those that can run, the one of the lowest rank is chosen

    unavailable(), refuses(device, dtype)   why it cannot run here, or does not take such inputs; else None
    describe()                              what it is, for `pamm doctor`
    forward(inputs, keep) -> (y, kept)      `keep`: whether `backward` will be called
    kept(inputs, keep)                      an empty tensor like what its forward keeps
    backward(dy, inputs, kept)              the gradients of `inputs.tensors()`

or, in place of the last three, `selective_scan(inputs) -> y`, like the reference's, which torch's autograd follows and which
is not a node of its own in a graph (chunked, which is there to be seen through).
An engine of another package is made known by `register_engine`.
`inputs` are `Inputs`, prepared; y and dy are like x. The environment variable PAMM_SCAN_ENGINE replaces the automatic choice.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pamm.ops.compiled import exporting
from pamm.ops.selective_scan import reference
from pamm.ops.selective_scan.inputs import Inputs

ENGINES: dict[str, Any] = {}
"""Engines of the operator, the preferred first. "reference" is known beside them and chosen only by name."""


def register_engine(name: str, engine: Any) -> None:
    """Make an engine available.

    Args:
        name: its name.
        engine: a module or object with the functions that this module's docstring lists.
    """
    ENGINES[name] = engine
    ranked = sorted(ENGINES.items(), key=lambda item: item[1].RANK)
    ENGINES.clear()
    ENGINES.update(ranked)


for _found in pkgutil.iter_modules(__path__):
    if not _found.name.startswith("_"):
        _module = importlib.import_module(f"{__name__}.{_found.name}")
        if hasattr(_module, "RANK"):
            register_engine(_found.name, _module)

VARIABLE = "PAMM_SCAN_ENGINE"


class EngineStatus(NamedTuple):
    """One line of `explain`."""

    engine: str
    available: bool
    reason: str


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    orders: Tensor,
    *,
    delta_bias: Tensor | None = None,
    softplus: bool = True,
    engine: str = "auto",
) -> Tensor:
    """Sum over K scan orders of the selective recurrence (Mamba; PAMM eq. 17-20), every output put back in its place.

    Along every order: h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t and y_t = C_t·h_t + D x_t, with h_0 = 0.

    Args:
        x: (G, B, L, D): G groups (tasks) with parameters of their own, B images, L positions, D channels.
        delta: (G, B, L, D) where all orders share their parameters, or (G, B, K, L, D) where each has its own. The
            step Δ is softplus(delta + delta_bias).
        A: (G, D, N) or (G, K, D, N), negative.
        B: (G, B, L, N) or (G, B, K, L, N).
        C: as B.
        D: (G, D) or (G, K, D).
        orders: (K, L) int64, K from 1 to 8; orders[k] lists the positions as order k visits them.
        delta_bias: as D, or None.
        softplus: False takes delta + delta_bias as the step itself.
        engine: "auto", or an engine's name (see `explain`).

    Returns:
        y (G, B, L, D) in x's dtype. States, exponentials and sums are float32 whatever the autocast or the inputs'
        dtype (float64 where x is float64).

    Raises:
        ValueError: shapes, devices or orders that do not fit together, or an engine that is unknown or cannot run this.
    """
    bias = torch.zeros_like(D) if delta_bias is None else delta_bias
    given = Inputs(x, delta, A, B, C, D, bias, orders.to(x.device), softplus)
    given.check()
    with _without_autocast(x.device.type):
        name = choose(x.device.type, x.dtype, engine)
        inputs = given.prepared()
        form = reference if name == "reference" else ENGINES[name]
        if hasattr(form, "selective_scan"):
            if not (torch.compiler.is_compiling() or exporting()):
                inputs.check_orders()
            return form.selective_scan(inputs).to(x.dtype)
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.tensors())
        y, _ = _scan(*inputs, name, keep)
        return y.to(x.dtype)


@torch.compiler.assume_constant_result
def choose(device: str, dtype: torch.dtype, engine: str = "auto") -> str:
    """Choose the engine of a scan.

    `engine` decides unless it is "auto". Then PAMM_SCAN_ENGINE decides. Without both, it is "chunked" while a model is exported,
    otherwise the first engine that takes such inputs.

    Args:
        device: type of the device, "cpu", "cuda", ….
        dtype: dtype of x.
        engine: "auto", or an engine's name.

    Returns:
        Name of the engine.

    Raises:
        ValueError: the engine is unknown, cannot run here, or does not take these inputs.
    """
    name = os.environ.get(VARIABLE, "auto") if engine == "auto" else engine
    if name == "auto":
        if exporting():
            return "chunked"
        return next(name for name in ENGINES if _objection(name, device, dtype) is None)
    known = (*ENGINES, "reference")
    if name not in known:
        source = f"{VARIABLE}={name}" if engine == "auto" else f"engine='{name}'"
        raise ValueError(f"{source}: unknown scan engine; known engines: auto, {', '.join(known)}")
    objection = _objection(name, device, dtype)
    if objection is not None:
        raise ValueError(f"scan engine '{name}' cannot run this: {objection}; use engine='auto' or unset {VARIABLE}")
    return name


def explain() -> list[EngineStatus]:
    """List every engine, the preferred first.

    Returns:
        For each engine: whether it runs on this machine, and the reason.
    """
    rows = []
    for name, module in ENGINES.items():
        reason = module.unavailable()
        rows.append(EngineStatus(name, reason is None, module.describe() if reason is None else reason))
    return [*rows, EngineStatus("reference", True, "the definition in torch, for comparisons; never chosen by itself")]


def _without_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


@torch.compiler.assume_constant_result  # older versions of torch cannot trace the question
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _objection(name: str, device: str, dtype: torch.dtype) -> str | None:
    if name == "reference":
        return None
    return ENGINES[name].unavailable() or ENGINES[name].refuses(device, dtype)


TENSORS = ", ".join(f"Tensor {name}" for name in Inputs._fields if name != "softplus")
"""Of both operators' schemas, which are flat: a graph holds tensors, not tuples with names."""


@torch.library.custom_op(
    "pamm::selective_scan",
    mutates_args=(),
    schema=f"({TENSORS}, bool softplus, str engine, bool keep) -> (Tensor, Tensor)",
)
def _scan(*arguments):
    """The scan as one node of a graph: y and what the engine keeps for backward."""
    *given, engine, keep = arguments
    inputs = Inputs(*given)
    inputs.check_orders()
    return ENGINES[engine].forward(inputs, keep)


@_scan.register_fake
def _(*arguments):
    *given, engine, keep = arguments
    inputs = Inputs(*given)
    return torch.empty_like(inputs.x, memory_format=torch.contiguous_format), ENGINES[engine].kept(inputs, keep)


@torch.library.custom_op(
    "pamm::selective_scan_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {TENSORS}, Tensor kept, bool softplus, str engine) -> ({', '.join(['Tensor'] * 7)})",
)
def _scan_backward(dy, *arguments):
    *tensors, kept, softplus, engine = arguments
    with _without_autocast(dy.device.type):
        return ENGINES[engine].backward(dy, Inputs(*tensors, softplus=softplus), kept)


@_scan_backward.register_fake
def _(dy, *arguments):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in arguments[:7])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, softplus, engine, _ = inputs
    ctx.set_materialize_grads(False)  # the kept states have no gradient: no zeros of their size
    ctx.save_for_backward(*tensors, output[1])
    ctx.softplus, ctx.engine = softplus, engine


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 11
    gradients = _scan_backward(dy, *ctx.saved_tensors, ctx.softplus, ctx.engine)
    return (*gradients, None, None, None, None)


_scan.register_autograd(_backward, setup_context=_setup_context)
