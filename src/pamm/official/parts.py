"""Tensors that the checkpoint and the network arrange differently: forms, parts, and places made of them.

Every form is linear and one to one, so that a table of parts reads weights one way and names gradients the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pamm.official.names import OfficialError, Place


@dataclass(frozen=True)
class Form:
    """A rearrangement and its inverse, both linear, so that they hold for gradients as well."""

    to_network: Callable[[Tensor], Tensor]
    to_checkpoint: Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _drop_kernel(weight: Tensor) -> Tensor:
    return weight[..., 0, 0]


def _add_kernel(weight: Tensor) -> Tensor:
    return weight[..., None, None]


def _split_orders(x: Tensor) -> Tensor:
    return x.unflatten(0, (4, -1))


def _join_orders(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def merging_to_timm(weight: Tensor) -> Tensor:
    """PatchMerging over the last axis: MMSegmentation's (channel, then 00 01 10 11) → timm's (00 10 01 11, then channel)."""
    return weight.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)


def merging_to_mmseg(weight: Tensor) -> Tensor:
    """Inverse of `merging_to_timm`."""
    return weight.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)


SAME = Form(_same, _same)
POINTWISE = Form(_drop_kernel, _add_kernel)  # (o, i, 1, 1) ↔ (o, i)
PER_ORDER = Form(_split_orders, _join_orders)  # (K·e, …) ↔ (K, e, …)
MERGING = Form(merging_to_timm, merging_to_mmseg)


@dataclass(frozen=True)
class Part:
    """Where rows of a checkpoint's entry lie in the network: our tensor `key`, at `index`."""

    key: str
    index: Any = ()
    form: Form = SAME

    def view(self, own: Mapping[str, Tensor | None]) -> Tensor | None:
        """Our numbers in the checkpoint's arrangement."""
        tensor = own[self.key]
        return None if tensor is None else self.form.to_checkpoint(tensor[self.index])


@dataclass(frozen=True)
class Parts(Place):
    """A place of another arrangement than ours: the rows of a checkpoint's entry, one part after another."""

    parts: tuple[Part, ...] = ()

    def collect(self, own: Mapping[str, Tensor | None]) -> Tensor | None:
        found = [view for part in self.parts if (view := part.view(own)) is not None]
        if len(found) < len(self.parts):
            return None
        return found[0] if len(found) == 1 else torch.cat(found)


def place(*parts: Part) -> Parts:
    return Parts(" and ".join(part.key for part in parts), parts=parts)


def network_tensors(
    used: Mapping[str, Parts], state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The checkpoint's numbers in tensors like `own`. Raises OfficialError for one of another shape."""
    filled = {key: torch.empty_like(value) for key, value in own.items()}
    for key, place in used.items():
        views = [view for part in place.parts if (view := part.view(own)) is not None]
        expected = (sum(len(view) for view in views), *views[0].shape[1:]) if views[0].dim() else ()
        if tuple(state[key].shape) != expected:
            raise OfficialError(
                f"{key}: found shape {tuple(state[key].shape)}, expected {expected}, as the other tensors imply; the "
                "checkpoint is of another architecture, or damaged"
            )
        rows = state[key].split([len(view) for view in views]) if len(views) > 1 else [state[key]]
        for part, values in zip(place.parts, rows, strict=True):
            filled[part.key][part.index] = part.form.to_network(values).to(filled[part.key].dtype)
    return filled
