"""Features and router weights of a forward pass, taken by hooks that are there only while someone looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pamm.look import LookError
from pamm.models.model import MultiTaskModel
from pamm.models.mtmamba import MTMambaDecoder
from pamm.models.pamm import PAMMDecoder
from pamm.models.pamm_released import ReleasedDecoder, ReleasedExperts

FUSED = "fused"
"""Name of the row behind the Task Decoder."""

GENERAL = "backbone"
"""Name of the column of features that all tasks share."""

PARAMETERS = ("B", "C")
"""Parameters of the scan that a router can mix (paper eq. 14-15)."""


@dataclass
class Readout:
    """Intermediate results of the last forward pass.

    backbone: the stage maps (B, C, h, w), first to last. stages: per decoder stage, in the order they run, (T, B, d, h, w)
    task features as they leave it. fused: task → (B, d, h, w), what the heads receive. weights: (parameter, decoder stage)
    → (T, B, E) expert weights, zero where not among the top k. mix: likewise (T, B), what the released PAMM multiplies a
    task's own expert by.
    """

    backbone: list[Tensor] = field(default_factory=list)
    stages: dict[int, Tensor] = field(default_factory=dict)
    fused: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    mix: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def features(self, model: MultiTaskModel) -> dict[str, dict[str, Tensor]]:
        """Row → column → (B, C, h, w): "stage 1" … and "fused"; "backbone" and the tasks.

        Beside a decoder stage stands the backbone's map that enters it, beside the fused features the backbone's last. A
        decoder whose last stage is what the heads receive has no row "fused".
        """
        plan = plan_of(model)
        rows = {}
        for number, maps in sorted(self.stages.items()):
            general = self.backbone[plan.entering[number]]
            rows[f"stage {number + 1}"] = {GENERAL: general, **dict(zip(model.tasks, maps, strict=True))}
        if plan.fuses:
            rows[FUSED] = {GENERAL: self.backbone[-1], **self.fused}
        return rows


@dataclass(frozen=True)
class Plan:
    """Where to look in a decoder.

    stages: the modules whose outputs are the task features, and how an output becomes (T, B, d, h, w). entering: per
    stage, the backbone's map that enters it. fuses: whether something joins the stages before the heads. routers: the
    modules that hold a router, per (parameter, stage).
    """

    stages: list[nn.Module]
    arrange: Callable[[Any], Tensor]
    entering: list[int]
    fuses: bool
    routers: dict[tuple[str, int], nn.Module] = field(default_factory=dict)


def _pamm(decoder: PAMMDecoder) -> Plan:
    stages = list(decoder.local if decoder.pame is None else decoder.pame)
    routers = {
        (name, s): getattr(stage, name).router
        for s, stage in enumerate(decoder.pame or [])
        for name in PARAMETERS
        if getattr(stage, name).router is not None
    }
    return Plan(stages, lambda y: y.transpose(0, 1), list(range(len(stages))), decoder.fuse is not None, routers)


def _released(decoder: ReleasedDecoder) -> Plan:
    routers = {
        (name, s): getattr(stage, name).routers
        for s, stage in enumerate(decoder.stages)
        for name in PARAMETERS
        if isinstance(getattr(stage, name), ReleasedExperts)
    }
    return Plan(list(decoder.stages), torch.stack, list(range(len(decoder.stages))), True, routers)


def _mtmamba(decoder: MTMambaDecoder) -> Plan:
    entering = list(range(len(decoder.channels) - 2, -1, -1))
    return Plan(list(decoder.stages), lambda y: y.movedim(-1, 2), entering, False)


PLANS: dict[type, Callable[..., Plan]] = {PAMMDecoder: _pamm, ReleasedDecoder: _released, MTMambaDecoder: _mtmamba}
"""Decoder class → the modules to read in it."""


def plan_of(model: MultiTaskModel) -> Plan:
    """The modules to read in a model's decoder. Raises LookError for a decoder of another package."""
    kind = type(model.decoder)
    if kind not in PLANS:
        known = ", ".join(known.__name__ for known in PLANS)
        raise LookError(f"a {kind.__name__} cannot be looked into, only {known}; add it to PLANS in pamm.look.readout")
    return PLANS[kind](model.decoder)


@contextmanager
def reading(model: MultiTaskModel) -> Iterator[Readout]:
    """Context manager: inside, every forward pass of the network fills the readout. The network's output does not change.

    Args:
        model: the network; it is restored at the end.

    Yields:
        The readout.

    Raises:
        LookError: the network has nothing to read.
    """
    plan, seen = plan_of(model), Readout()
    handles = []
    try:
        handles.append(model.backbone.register_forward_hook(_write(seen, "backbone")))
        handles.append(model.decoder.register_forward_hook(_write(seen, "fused")))
        for number, stage in enumerate(plan.stages):
            handles.append(stage.register_forward_hook(_write_item(seen.stages, number, plan.arrange)))
        for place, router in plan.routers.items():
            handles += _router_hooks(seen, place, router)
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _write(seen: Readout, name: str) -> Callable[[nn.Module, tuple, object], None]:
    return lambda module, inputs, output: setattr(seen, name, output)


def _write_item(store: dict, key: object, arrange: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    return lambda module, inputs, output: store.__setitem__(key, arrange(output))


def _router_hooks(seen: Readout, place: tuple[str, int], router: nn.Module) -> list:
    """Hooks on a router of all tasks, or on one router per task, whose weights are put together when the last has run."""
    if not isinstance(router, nn.ModuleDict):
        return [router.register_forward_hook(_write_item(seen.weights, place, lambda weights: weights))]
    parts: dict[str, tuple[Tensor, Tensor]] = {}

    def write(task: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
            parts[task] = output
            if len(parts) == len(router):
                weights, mix = zip(*(parts[name] for name in router), strict=True)
                seen.weights[place], seen.mix[place] = torch.stack(weights), torch.stack(mix)[..., 0]
                parts.clear()

        return hook

    return [one.register_forward_hook(write(task)) for task, one in router.items()]
