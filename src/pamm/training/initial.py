"""Fine-tuning: the weights of a saved network for one with other tasks, classes or image size; and parts that are not trained.

Tensors go by name. What belongs to a task goes by the task's name, also where tasks are stacked in an axis of one tensor, and
the outputs of a head by the names of their classes. Which axes these are is seen by building the network with one task, and
with one class, more.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from pamm.config.experiment import ModelConfig
from pamm.config.strict import ConfigError, from_dict
from pamm.models.model import MultiTaskModel
from pamm.models.registry import build_model
from pamm.models.saved import CheckpointError
from pamm.nn.prompts import resize_gather, resize_spread
from pamm.nn.router import resize_positions
from pamm.tasks import Task
from pamm.tasks.segmentation import numbered_classes

LEAST = 0.01
"""Smallest share of the parameters that a source must fill; less would be a coincidence."""

OTHER_TASK = "one_more"

Pairs = tuple[list[int], list[int]]
"""Positions along an axis, in this network and in the source."""


@dataclass
class Fit:
    """The weights that a network took over, by parameter name."""

    source: str
    taken: dict[str, int] = field(default_factory=dict)
    """Name → number of elements taken."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Name → number of elements."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Name → why some elements were not taken, or how they were changed."""
    unused: list[str] = field(default_factory=list)
    """Names in the source that this network does not have."""
    notes: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the elements that were taken."""
        return sum(self.taken.values()) / max(1, sum(self.sizes.values()))

    def incomplete(self) -> list[str]:
        """Names with new elements."""
        return [name for name, size in self.sizes.items() if self.taken[name] < size]

    def __str__(self) -> str:
        whole = [name for name, size in self.sizes.items() if self.taken[name] == size]
        partly = [name for name, size in self.sizes.items() if 0 < self.taken[name] < size]
        new = [name for name in self.sizes if not self.taken[name]]
        found, total = sum(self.taken.values()) / 1e6, sum(self.sizes.values()) / 1e6
        lines = [
            f"weights from {self.source}: {len(whole)} of {len(self.sizes)} tensors whole, {len(partly)} in part, {len(new)} "
            f"new; {found:.3g} of {total:.3g} million numbers ({100 * self.share:.1f} %)"
        ]
        for what, names in (("changed", whole), ("in part", partly), ("new", new)):
            lines += [f"  {what}: {text}" for text in self._by_reason(names)]
        if self.unused:
            lines.append(f"  not used: {_listed(self.unused)}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def _by_reason(self, names: Iterable[str]) -> list[str]:
        groups = defaultdict(list)
        for name in names:
            if name in self.reasons:
                groups[self.reasons[name]].append(name)
        return [f"{_listed(group)}: {reason}" for reason, group in groups.items()]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:2])
    return shown if len(names) <= 2 else f"{len(names)} tensors, e.g. {shown}"


def take_weights(network: MultiTaskModel, source: MultiTaskModel, name: str) -> Fit:
    """Fill the network with the source's weights as far as they fit; the rest keeps the values it has.

    name: the source's, for the messages. Raises CheckpointError where nothing fits and for weights that are not finite.
    """
    fit = Fit(name, notes=_other_settings(network, source))
    here, there = _Layout(network), _Layout(source)
    own, given = network.state_dict(), {there.canonical(key): key for key in source.state_dict()}
    weights, used = source.state_dict(), set()
    for key, value in own.items():
        twin = given.get(here.canonical(key))
        fit.sizes[key], fit.taken[key] = value.numel(), 0
        if twin is None:
            fit.reasons[key] = _absent(here.canonical(key), network, source)
            continue
        used.add(twin)
        if not weights[twin].isfinite().all():
            raise CheckpointError(f"{name}: {twin} holds numbers that are not finite. Start from other weights")
        own[key], fit.taken[key], reason = _fit(here, key, value, there, twin, weights[twin])
        if reason:
            fit.reasons[key] = reason
    fit.unused = sorted(weights.keys() - used)
    if fit.share < LEAST:
        raise CheckpointError(
            f"--init {name}: nothing of it fits this network ({100 * fit.share:.1f} % of the numbers). {fit}\nGive a source with "
            "the same backbone or decoder, or set --model.backbone.name and --model.decoder.width as it has them"
        )
    network.load_state_dict(own)
    return fit


class _Layout:
    """Which axes of a network's tensors are stacks of tasks, and which are the outputs of a head."""

    def __init__(self, network: MultiTaskModel):
        self.network, self.tasks = network, list(network.tasks)
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        wider = {name: copy.copy(task) for name, task in network.tasks.items()}
        for task in wider.values():
            task.channels += 1
        first = next(iter(network.tasks.values()))
        more_tasks, more_classes = (_shapes(network, tasks) for tasks in ({**network.tasks, OTHER_TASK: first}, wider))
        self.stacked = {key: _grown(shape, more_tasks.get(key, shape)) for key, shape in shapes.items()}
        self.classes = {key: _grown(shape, more_classes.get(key, shape)) for key, shape in shapes.items()}

    def canonical(self, key: str) -> str:
        """The key with tasks' names in place of their numbers."""
        return re.sub(r"(?<=\.tasks\.)(\d+)(?=\.)", lambda found: self.tasks[int(found[1])], key)

    def task(self, key: str) -> Task | None:
        """The task whose head holds a tensor."""
        head = re.match(r"heads\.([^.]+)\.", key)
        return self.network.tasks.get(head[1]) if head else None


def _shapes(network: MultiTaskModel, tasks: Mapping[str, Task]) -> dict[str, tuple[int, ...]]:
    """Name → shape in the same network with these tasks, which is not made."""
    config = from_dict(ModelConfig, network.settings["model"])
    config = replace(config, backbone=replace(config.backbone, pretrained=False))
    built = build_model(config, tasks, network.image_size, "meta")
    return {key: tuple(value.shape) for key, value in built.state_dict().items()}


def _grown(shape: tuple[int, ...], grown: tuple[int, ...]) -> dict[int, int]:
    """Axis → number of additional elements."""
    return {axis: b - a for axis, (a, b) in enumerate(zip(shape, grown, strict=True)) if b != a}


def _fit(
    here: _Layout, key: str, value: Tensor, there: _Layout, twin: str, given: Tensor
) -> tuple[Tensor, int, str | None]:
    """The tensor with what of `given` fits, the number of elements taken, and what did not fit or was changed."""
    resized = _resized(here, key, value, there, given)
    if resized is not None:
        sizes = [f"{rows}×{columns}" for rows, columns in (_grid(there), _grid(here))]
        return resized, value.numel(), f"resized, {sizes[0]} tokens there, {sizes[1]} here"
    other = f"another shape, {list(given.shape)} there, {list(value.shape)} here"
    if value.dim() != given.dim() or value.is_floating_point() != given.is_floating_point():
        return value, 0, other
    pairs, reasons = [], []
    for axis, (size, length) in enumerate(zip(value.shape, given.shape, strict=True)):
        found = _pairs(here, key, axis, size, there, twin, length)
        if found is None:
            return value, 0, other
        pairs.append(found[0])
        reasons += [found[1]] if found[1] else []
    taken = 1
    for places, _ in pairs:
        taken *= len(places)
    reason = "; ".join(reasons) or None
    return (_put(value, given.to(value.dtype), pairs) if taken else value), taken, reason


def _pairs(
    here: _Layout, key: str, axis: int, size: int, there: _Layout, twin: str, length: int
) -> tuple[Pairs, str | None] | None:
    """Matching positions of an axis, and why some do not match; None for axes that do not fit."""
    block, other = here.stacked[key].get(axis), there.stacked[twin].get(axis)
    if block is not None or other is not None:
        if block is None or block != other or size != block * len(here.tasks) or length != block * len(there.tasks):
            return None
        shared = [task for task in here.tasks if task in there.tasks]
        new = [task for task in here.tasks if task not in there.tasks]
        ours, theirs = (
            [place for task in shared for place in range(tasks.index(task) * block, (tasks.index(task) + 1) * block)]
            for tasks in (here.tasks, there.tasks)
        )
        return (ours, theirs), f"the slices of {', '.join(new)} are new: {SOURCE_LACKS_TASK}" if new else None
    if axis in here.classes[key] and axis in there.classes[twin]:
        return _class_pairs(here.task(key), there.task(twin))
    return ((list(range(size)), list(range(size))), None) if size == length else None


SOURCE_LACKS_TASK = "tasks that the source lacks"


def _class_pairs(here: Task | None, there: Task | None) -> tuple[Pairs, str | None] | None:
    """The outputs of two heads of one task that have the same meaning."""
    if here is None or there is None:
        return None
    own, given = here.options().get("classes"), there.options().get("classes")
    everything = list(range(here.channels)), list(range(here.channels))
    if own is None or given is None:
        measures = [task.options().get("unit") == "disparity" for task in (here, there)]
        if measures[0] != measures[1]:
            words = {True: "disparity", False: "depth"}
            return ([], []), f"the source predicts {words[measures[1]]}, this network {words[measures[0]]}"
        return (everything, None) if here.channels == there.channels else None
    if list(own) == list(given):
        return everything, None
    if numbered_classes(len(own)) == list(own) or numbered_classes(len(given)) == list(given):
        if len(own) == len(given):
            return (
                everything,
                f"its {len(own)} classes have only numbers: taken in their order, which must be the same",
            )
        return ([], []), f"{len(given)} classes without names there, {len(own)} here"
    shared = [name for name in own if name in given]
    new = [name for name in own if name not in given]
    pairs = [list(own).index(name) for name in shared], [list(given).index(name) for name in shared]
    if not new:
        return pairs, f"{len(shared)} classes taken by their names, in another order or from more"
    names = ", ".join(new[:5]) + (", …" if len(new) > 5 else "")
    return pairs, f"{len(shared)} of {len(own)} classes taken by their names; new: {names}"


def _put(value: Tensor, given: Tensor, pairs: list[Pairs], axis: int = 0) -> Tensor:
    """`value` with the elements of `given` at their places."""
    if axis == value.dim():
        return given.clone()
    places, origins = (torch.tensor(side, dtype=torch.long) for side in pairs[axis])
    if len(places) == value.shape[axis] == given.shape[axis] and bool((places == origins).all()):
        return _put(value, given, pairs, axis + 1)
    rows = _put(value.index_select(axis, places), given.index_select(axis, origins), pairs, axis + 1)
    return value.index_copy(axis, places, rows)


def _grid(layout: _Layout) -> tuple[int, int]:
    height, width = getattr(layout.network.backbone, "grid", (0, 0))
    return height, width


def _resized(here: _Layout, key: str, value: Tensor, there: _Layout, given: Tensor) -> Tensor | None:
    """Weights of positions brought to this network's grid of tokens; None for others, and where nothing is to be changed."""
    (height, width), (rows, columns) = _grid(here), _grid(there)
    if key.endswith(".positions") and tuple(value.shape) == (height, width) and tuple(given.shape) == (rows, columns):
        return resize_positions(given, (height, width)) if (height, width) != (rows, columns) else None
    if key.startswith(("backbone.spread.", "backbone.gather.")) and (height, width) != (
        rows,
        columns,
    ):  # TaskPrompter's
        axis = 0 if ".spread." in key else value.dim() - 1
        sizes = value.shape[axis], given.shape[axis] if given.dim() == value.dim() else 0
        if sizes == (height * width, rows * columns):
            return (resize_gather if axis else resize_spread)(given, (rows, columns), (height, width))
    if not key.endswith("pos_embed") or value.dim() != 3 or given.dim() != 3 or value.shape[-1] != given.shape[-1]:
        return None
    prefix, before = value.shape[1] - height * width, given.shape[1] - rows * columns
    if min(prefix, before) < 0 or ((height, width) == (rows, columns) and prefix == before):
        return None
    grid = resample_abs_pos_embed(
        given[:, before:], new_size=[height, width], old_size=[rows, columns], num_prefix_tokens=0
    )
    start = given[:, :before] if prefix == before else value[:, :prefix]  # a class token that the source lacks is new
    return torch.cat([start, grid], dim=1)


def _absent(key: str, network: MultiTaskModel, source: MultiTaskModel) -> str:
    """The reason why the source has no such tensor."""
    parts = set(key.split("."))
    new = [task for task in network.tasks if task in parts and task not in source.tasks]
    return f"the source has no task {new[0]}" if new else "the source has no such tensor"


def _other_settings(network: MultiTaskModel, source: MultiTaskModel) -> list[str]:
    """Settings of the network that are others than the source's, which may change what the same weights compute."""
    here, there = (_leaves(model.settings["model"]) for model in (network, source))
    found = [
        f"{key} {there.get(key)} there, {here.get(key)} here"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key) and not key.endswith(("pretrained", "drop_path_rate"))
    ]
    return [f"other settings than the source's: {'; '.join(found)}"] if found else []


def _leaves(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, Mapping):
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def freeze(network: MultiTaskModel, what: str | None) -> None:
    """Freeze the parts that `train.freeze` names. Raises ConfigError."""
    if what is None:
        return
    found = re.fullmatch(r"backbone(?::([0-9]{1,6}))?", what)
    if not found:
        raise ConfigError(f"train.freeze: found '{what}', expected backbone, or backbone:N with a number of blocks N")
    if found[1] is None:
        network.freeze([network.backbone])
        return
    count, blocks = int(found[1]), len(network.backbone.blocks())
    if not 1 <= count <= blocks:
        raise ConfigError(f"train.freeze: found {what}, expected backbone:1 to backbone:{blocks}, of {blocks} blocks")
    network.freeze(*network.backbone.before(count))
