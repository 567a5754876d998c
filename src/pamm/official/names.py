"""The names of a published system's tensors: a table of rules, and what was done with every key of a checkpoint.

A rule pairs our name with theirs, with the same placeholders in both:

    {s} {k}  a number        {t}  a task        {p}  B or C        {w}  the rest of the name

`[k]` or `[t]` after our name: our tensor holds all experts or tasks in its leading dimension, theirs one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pamm import PammError
from pamm.files import shown

PLACEHOLDERS = {"s": r"\d+", "k": r"\d+", "t": r"[^.]+", "p": r"[BC]", "w": r".+"}

Rules = Sequence[tuple[str, str]]
"""Pairs of our name and theirs."""


class OfficialError(PammError, ValueError):
    """A checkpoint that cannot be read as a published one; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint lives in the network."""

    own: str
    """Name of our tensor."""
    row: Any = None
    """Its row, or rows and columns, in our tensor (an index); None: all of it."""
    skip: int = 0
    """First entries of their second dimension that our tensor leaves out."""
    shape: tuple[int, ...] = ()
    """Their shape, which may have further dimensions of length 1."""

    def view(self, own: Tensor) -> Tensor:
        """The part of our tensor that corresponds to theirs.

        Args:
            own: our tensor.

        Returns:
            A view.
        """
        return own if self.row is None else own[self.row]

    def own_part(self, foreign: Tensor) -> Tensor:
        """Their tensor without the entries that ours leaves out.

        Args:
            foreign: their tensor.

        Returns:
            A view.
        """
        return foreign[:, self.skip :] if self.skip else foreign

    def foreign(self, own: Tensor | None) -> Tensor | None:
        """Our tensor (or its gradient) in their shape, with zeros for the entries that ours leaves out.

        Args:
            own: our tensor, or None.

        Returns:
            A tensor of their shape; None for None.
        """
        if own is None:
            return None
        part = self.view(own)
        if self.skip:
            part = F.pad(part, (0, 0, self.skip, 0))
        return part.reshape(self.shape) if part.numel() == torch.Size(self.shape).numel() else part

    def collect(self, own: Mapping[str, Tensor | None]) -> Tensor | None:
        """Find our tensor (or its gradient) that corresponds to theirs.

        Args:
            own: our tensors by name.

        Returns:
            The tensor in their shape; None where ours is None.
        """
        return self.foreign(own[self.own])


SomePlace = TypeVar("SomePlace", bound=Place)


@dataclass
class LoadReport:
    """The use of every key of a checkpoint.

    Args:
        system: name of the network, e.g. "pamm-released".
    """

    system: str
    used: Mapping[str, Place] = field(default_factory=dict)
    """Their key → its place in the network."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Their key → why the network does not need it."""
    missed: dict[str, str] = field(default_factory=dict)
    """Constants that neither the checkpoint nor `extras` gave: their key → what was taken. Anything else missing is an error."""
    parameters: int = 0
    """Numbers in the tensors that are used or ignored, without BatchNorm's statistics and the constants."""
    notices: list[str] = field(default_factory=list)
    """Assumptions and resized tensors, in words."""

    @property
    def keys(self) -> dict[str, str]:
        """Their key → our tensor that holds it, whole or as one of its rows."""
        return {key: place.own for key, place in self.used.items()}

    def __str__(self) -> str:
        lines = [
            f"{self.system}: {len(self.used)} tensors used, {len(self.ignored)} ignored, {len(self.missed)} missed, none unknown; "
            f"{self.parameters:,} parameters"
        ]
        for title, keys in (("ignored", self.ignored), ("missed", self.missed)):
            for why in dict.fromkeys(keys.values()):
                of_them = [key for key, value in keys.items() if value == why]
                lines.append(f"  {title}: {len(of_them)}, e.g. {of_them[0]} ({why})")
        return "\n".join(lines + [f"  {notice}" for notice in self.notices])


def theirs(own: str, length: int, tasks: Sequence[str], rules: Rules) -> Iterator[tuple[str, int | None]]:
    """The checkpoint's key of our tensor `own`, or one per row of its `length` rows, each with its row.

    Raises OfficialError for a name that no rule knows.
    """
    for ours, foreign in rules:
        name, _, rows = ours.partition("[")
        match = re.fullmatch(_pattern(name), own)
        if match is None:
            continue
        if not rows:
            yield foreign.format(**match.groupdict()), None
        else:
            values = list(tasks) if rows == "t]" else range(length)
            for row, value in enumerate(values):
                yield foreign.format(**match.groupdict(), **{rows[0]: value}), row
        return
    raise OfficialError(f"no rule names the tensor '{own}' of this network")


def places(own: Mapping[str, Tensor], tasks: Sequence[str], rules: Rules) -> dict[str, Place]:
    """Their key → its place, for every tensor of the network. A pure function of names and shapes."""
    found = {}
    for name, tensor in own.items():
        for key, row in theirs(name, len(tensor) if tensor.dim() else 0, tasks, rules):
            found[key] = Place(name, row)
    return found


def _pattern(name: str) -> str:
    return re.sub(r"\\\{(\w)\\\}", lambda match: f"(?P<{match[1]}>{PLACEHOLDERS[match[1]]})", re.escape(name))


def match_keys(
    state: Mapping[str, Tensor], table: Mapping[str, SomePlace], constants: Mapping[str, str], unused: Mapping[str, str]
) -> tuple[dict[str, SomePlace], dict[str, str], dict[str, str]]:
    """Used keys of a checkpoint (with shapes), ignored ones with the reason, and constants with their default.

    constants: last part of our constant tensors' names → what stands in for them. unused: pattern of their keys → why the network
    needs none. Raises OfficialError for a key that is missing or unknown, naming some.
    """
    used = {key: replace(table[key], shape=tuple(state[key].shape)) for key in state if key in table}
    left = [key for key in state if key not in table]
    ignored = {key: why for key in left for pattern, why in unused.items() if re.fullmatch(pattern, key)}
    absent = {key: place.own for key, place in table.items() if key not in state}
    last = {key: own.rsplit(".", 1)[-1] for key, own in absent.items()}
    defaults = {key: constants[name] for key, name in last.items() if name in constants}
    missing, unknown = [key for key in absent if key not in defaults], [key for key in left if key not in ignored]
    if missing or unknown:
        parts = [("missing", missing), ("unknown", unknown)]
        told = "; ".join(f"{len(keys)} {what}, e.g. {shown(', '.join(keys[:3]), 200)}" for what, keys in parts if keys)
        raise OfficialError(
            f"not a whole checkpoint of this system: {told}. Nothing was loaded; use the file as its authors published it, or "
            "correct these keys"
        )
    return used, ignored, defaults


def count_parameters(state: Mapping[str, Tensor], keys: Iterable[str]) -> int:
    """Numbers in these tensors, without BatchNorm's statistics and the tables of windows."""
    statistics = ("running_mean", "running_var", "num_batches_tracked", "attn_mask", "relative_position_index")
    return sum(state[key].numel() for key in keys if not key.endswith(statistics))


@torch.no_grad()
def gather(
    own: Mapping[str, Tensor], used: Mapping[str, Place], state: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our tensors, of the shapes and types of `own` (whose values do not count), copied from theirs and from `constants`.

    What is given of a constant replaces its rows. Raises OfficialError for a tensor of another shape.
    """
    filled = {name: value.clone() for name, value in constants.items()}
    for key, place in used.items():
        if place.own not in filled:
            device = "meta" if state[key].is_meta else "cpu"
            filled[place.own] = torch.empty(own[place.own].shape, dtype=own[place.own].dtype, device=device)
        target, value = place.view(filled[place.own]), place.own_part(state[key])
        expected, shape = ([n for n in tensor.shape if n != 1] for tensor in (target, value))
        if expected != shape:
            raise OfficialError(
                f"{key}: found shape {tuple(state[key].shape)}, expected {tuple(target.shape)} (up to dimensions of length 1), "
                "as the other tensors imply; the checkpoint is of another architecture, or damaged"
            )
        target.copy_(value.reshape(target.shape))
    return filled
