"""The contract of a task: everything true of one map, in one file of this package.

A task knows how its label is read, how the label moves with its image, its loss, its metric, how logits become a
prediction in the task's unit, and how a prediction is drawn and saved. Nothing outside a task's own file asks for its name.
"""

from __future__ import annotations

import math
import types
import typing
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from pamm import PammError

if TYPE_CHECKING:
    from torchmetrics import Metric

TASKS: dict[str, type[Task]] = {}
"""Every registered task, by name."""

SomeTask = TypeVar("SomeTask", bound="Task")


def register(task: type[SomeTask]) -> type[SomeTask]:
    """Class decorator: makes a task available under its `name`."""
    if task.name in TASKS:
        raise ValueError(f"two tasks are called '{task.name}': {TASKS[task.name].__qualname__} and {task.__qualname__}")
    TASKS[task.name] = task
    return task


@dataclass(frozen=True)
class LabelStatistics:
    """What one or more labels of a task hold; those of several labels add up with `+`, from `LabelStatistics()` on.

    labels: number of labels, of which `empty` have no known pixel. pixels: of all of them, of which `ignored` are unknown.
    classes: name of a class → its pixels, every class of the task, also those of none; "no" and "yes" for masks; empty
    for tasks whose values are no classes. lowest, highest: range of the known values, depth alone; infinity and minus
    infinity where there are none.
    """

    labels: int = 0
    empty: int = 0
    pixels: int = 0
    ignored: int = 0
    classes: Mapping[str, int] = field(default_factory=dict)
    lowest: float = math.inf
    highest: float = -math.inf

    def __add__(self, other: LabelStatistics) -> LabelStatistics:
        classes = Counter(self.classes)
        classes.update(other.classes)
        return LabelStatistics(
            self.labels + other.labels,
            self.empty + other.empty,
            self.pixels + other.pixels,
            self.ignored + other.ignored,
            dict(classes),
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
        )

    @property
    def ignored_share(self) -> float:
        """Of all pixels, 0 to 1; 0 without any pixel."""
        return self.ignored / self.pixels if self.pixels else 0.0


class Task(ABC):
    """One dense prediction task.

    Labels are tensors (c, H, W), with ignored pixels equal to `ignore` in every channel. Logits are (B, channels, H, W).
    Predictions are (H, W) or (H, W, 3) arrays in the task's unit.
    """

    name: ClassVar[str]
    score: ClassVar[str]
    """Key of the metric that papers report for this task, one of those `metric().compute()` returns."""
    quick_score: ClassVar[str | None] = None
    """Key of the score that stands in for it while training, where `quick_metric` differs from `metric`."""
    higher_is_better: ClassVar[bool]
    ignore: ClassVar[float]
    """Value of a label's ignored pixels; padding and missing labels are filled with it."""
    pixelwise: ClassVar[bool] = True
    """Whether the metric is a sum over pixels, so that a large image may be measured in strips of rows."""
    balances_crops: ClassVar[bool] = False
    """Whether a training crop is redrawn while one class of this task's label dominates it."""
    suffixes: ClassVar[tuple[str, ...]] = (".png",)
    """How the names of the label files end that `read` takes, in lower case."""
    units: Mapping[str, str] = {}
    """Metric → its unit, e.g. "%", of those that have one; of metrics named "metric/class" under "metric"."""
    meaning: str = ""
    """What a value of a prediction is, with its unit and range, in words."""
    map_unit: str = ""
    """Unit of a prediction's values."""
    colours: ClassVar[str] = ""
    """What the colours of `draw` mean, in words, where they do not stand for classes."""
    label_channels: ClassVar[int] = 1
    label_dtype: ClassVar[torch.dtype] = torch.uint8
    ignored_remedy: ClassVar[str] = ""
    """What to do where ignored pixels may be meant as a class that no label holds."""

    channels: int
    """Number of maps the network outputs for this task."""

    def __init__(self, *, weight: float = 1.0):
        self.weight = float(weight)
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"task '{self.name}': weight is {weight}, expected a number of 0 or more")

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Keyword arguments, all JSON values, from which `create_task(self.name, **options)` rebuilds this task."""

    # -- the label and its way through the transforms ------------------------------------------------------------------

    @abstractmethod
    def read(self, path: Path) -> Tensor:
        """Label file of the folder layout → (label_channels, H, W) label. Raises `LabelError` for a file that is not one."""

    def resample(self, label: Tensor, size: tuple[int, int]) -> Tensor:
        """(c, h, w) label → (c, H, W) by nearest neighbour, source index ⌊i·h/H⌋ (as OpenCV's INTER_NEAREST)."""
        rows, columns = (torch.from_numpy(nearest_index(label.shape[i - 2], size[i])) for i in (0, 1))
        return label.index_select(-2, rows).index_select(-1, columns)

    def flip(self, label: Tensor) -> Tensor:
        """Mirror a (c, H, W) label left to right, values included (a normal's x changes sign)."""
        return label.flip(-1)

    def rescale(self, label: Tensor, factor: float) -> Tensor:
        """Change a label's values when its image was zoomed by `factor` (protocol: depth is divided by it)."""
        return label

    def finish(self, label: Tensor) -> Tensor:
        """Last step after cropping and padding (protocol §1.4): rules that depend on the whole cropped label."""
        return label

    def missing(self, size: tuple[int, int]) -> Tensor:
        """The label of an image that has none: (c, H, W), every pixel ignored."""
        return torch.full((self.label_channels, *size), self.ignore, dtype=self.label_dtype)

    def statistics(self, label: Tensor) -> LabelStatistics:
        """What one (c, H, W) label, as `read` gives it, holds; see `LabelStatistics`."""
        valid = self.valid(label)
        ignored = valid.numel() - int(valid.sum())
        return LabelStatistics(1, int(ignored == valid.numel()), valid.numel(), ignored, self.class_pixels(label))

    def class_pixels(self, label: Tensor) -> dict[str, int]:
        """Name of a class → its pixels in a label; empty for tasks whose values are no classes."""
        return {}

    def describe(self, found: LabelStatistics) -> str:
        """What labels hold, in words: the classes' shares of the known pixels, the range of values, the ignored share."""
        known = max(found.pixels - found.ignored, 1)
        shares = ", ".join(f"{name} {percent(count / known)}" for name, count in found.classes.items())
        ignored = f"{percent(found.ignored_share)} of the pixels ignored"
        return f"{shares}; {ignored}" if shares else ignored

    def remarks(self, found: LabelStatistics) -> list[str]:
        """What is doubtful in labels that hold this, each with what to do; empty where nothing is, and without labels."""
        absent = [name for name, count in found.classes.items() if not count] if found.labels else []
        if absent:
            names = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            remedy = f" {self.ignored_remedy}" if found.ignored and self.ignored_remedy else ""
            return [
                f"no label holds {names} ({len(absent)} of {len(found.classes)} classes), and {percent(found.ignored_share)} of "
                f"the pixels are ignored. Check the values in the files and the order of the classes.{remedy}"
            ]
        if found.ignored_share > MOSTLY:
            return [
                f"{percent(found.ignored_share)} of the pixels of its labels are ignored. Check how they were written"
            ]
        return []

    # -- loss and metric -------------------------------------------------------------------------------------------------

    def valid(self, label: Tensor) -> Tensor:
        """(..., c, H, W) label → (..., 1, H, W) bool, False where every channel is `ignore`."""
        return (label != self.ignore).any(-3, keepdim=True)

    def counts(self, label: Tensor) -> Tensor:
        """(B, c, H, W) → int64 vector of sums that normalise the loss, the number of valid pixels first.

        Sums over several batches or processes give the counts of their union, so that a loss split over processes or
        micro-batches adds up to the loss of the joined batch.
        """
        return self.valid(label).sum()[None]

    @abstractmethod
    def loss(self, logits: Tensor, label: Tensor, counts: Tensor | None = None) -> Tensor:
        """(B, channels, H, W) float logits, (B, c, H, W) label → scalar, unweighted.

        The sum over valid pixels divided by max(counts[0], 1). `counts` defaults to this batch's own; the caller passes the
        joined batch's when this batch is one part of it. With every pixel ignored the loss is 0 and has a gradient path.
        """

    @abstractmethod
    def metric(self) -> Metric:
        """A torchmetrics metric: `update(logits, label)`, `compute() → {name: 0-d tensor}`, states reduced by sum.

        `update` raises NonFiniteError for logits that hold NaN or infinite values.
        """

    def quick_metric(self) -> Metric:
        """The metric of the evaluations during training; differs where the reported one takes long."""
        return self.metric()

    def titled(self, metric: str) -> str:
        """A metric's name with its unit, as tables head it, e.g. "RMSE, m"."""
        unit = self.units.get(metric.partition("/")[0])
        return f"{metric}, {unit}" if unit else metric

    @property
    def image_score(self) -> str:
        """What `score_image` computes, in words."""
        return self.quick_score or self.score

    def score_image(self, logits: Tensor, label: Tensor) -> float:
        """(1, channels, H, W) logits, (1, c, H, W) label → the score of this image alone, by which reports rank images.

        NaN where the label gives it none. By default `quick_metric` of this image.
        """
        return float(self.quick_metric().to(logits.device)(logits, label)[self.quick_score or self.score])

    # -- predictions -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def decode(self, logits: Tensor) -> Tensor:
        """(B, channels, H, W) logits → (B, H, W) or (B, H, W, 3) prediction in the task's unit, pixel by pixel."""

    @abstractmethod
    def truth(self, label: Tensor) -> Tensor:
        """(c, H, W) label → (H, W) or (H, W, 3) in the form of `decode`; ignored pixels hold any value."""

    @abstractmethod
    def draw(
        self, prediction: np.ndarray, *, valid: np.ndarray | None = None, reference: np.ndarray | None = None
    ) -> np.ndarray:
        """Prediction (H, W) or (H, W, 3) → picture (H, W, 3) uint8.

        `valid` (H, W) bool paints the other pixels mid-grey. `reference` is a map whose range of values sets the colour
        scale, so that a prediction and its truth are comparable (tasks with a fixed scale take no notice). Given it, a
        strip of rows is drawn as in the whole.
        """

    def scale(self, values: np.ndarray) -> tuple[float, float] | None:
        """The lowest and highest value between which `draw` spreads its colours where `values` is its reference.

        None where the colours do not follow the range of the values, or no value is known.
        """
        return None

    @abstractmethod
    def label_file(self, prediction: np.ndarray) -> tuple[str, bytes]:
        """The prediction as a label file of the folder layout: its suffix, one of `suffixes`, and its content.

        `read` reads it back as what it was, to the precision of that file.
        """


MOSTLY = 0.9
"""Share of ignored pixels from which on a note tells it."""


def percent(share: float) -> str:
    """0 to 1 → "12.3 %"; what is little and not nothing does not become 0."""
    return "less than 0.1 %" if 0 < share < 0.001 else f"{100 * share:.3g} %"


def nearest_index(old: int, new: int) -> np.ndarray:
    """Source index ⌊i·old/new⌋ of each of `new` positions, in whole numbers: (new,) int64."""
    return np.arange(new) * old // new


class NonFiniteError(PammError, ValueError):
    """A network's output that holds NaN or infinite values, for which no score exists; the message names the task."""


class LabelError(PammError, ValueError):
    """A label file that cannot be used; the message names the file, what was expected and the remedy."""


def create_task(name: str, **options: Any) -> Task:
    """Build a registered task.

    Raises ValueError for an unknown name or option, naming the known ones, and for a value of another kind than the option's.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task '{name}'; known tasks: {', '.join(sorted(TASKS))}")
    known = option_defaults(name)
    hints: dict[str, Any] = {}
    with suppress(NameError):  # a task from elsewhere may name a type that it imports for type checkers alone
        hints = typing.get_type_hints(TASKS[name].__init__)
    for option in options:
        if option not in known:
            near = get_close_matches(option, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            listed = ", ".join(key for key in known if key != "weight") or "none"
            raise ValueError(f"task '{name}' has no option '{option}'.{hint} Its options: {listed}")
    return TASKS[name](**{key: _option(name, key, value, hints.get(key)) for key, value in options.items()})


def option_defaults(name: str) -> dict[str, Any]:
    """Option → default value, of a registered task."""
    return {key: value.default for key, value in signature(TASKS[name]).parameters.items()}


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def _option(task: str, name: str, value: Any, hint: Any) -> Any:
    """The value, as one of the plain kinds that `hint` allows; a hint that allows others leaves it to the task to judge.

    A number that YAML takes for text, as it does with 1e-3, is read as one. Raises ValueError.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if float in kinds and str not in kinds and isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    is_number = not isinstance(value, bool)
    is_kind = {float: is_number and isinstance(value, Real), int: is_number and isinstance(value, Integral)}
    if any(kind not in _KINDS or is_kind.get(kind, isinstance(value, kind)) for kind in kinds):
        return value
    wanted = " or ".join(_KINDS[kind] for kind in kinds)
    raise ValueError(f"task '{task}': {name} is {value!r}, expected {wanted}")
