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
    """Class decorator that makes a task available under its `name`.

    Args:
        task: the task's class.

    Returns:
        The same class.
    """
    if task.name in TASKS:
        raise ValueError(f"two tasks are called '{task.name}': {TASKS[task.name].__qualname__} and {task.__qualname__}")
    TASKS[task.name] = task
    return task


@dataclass(frozen=True)
class LabelStatistics:
    """Counts of the values in one or more labels of a task. Add them with `+`, starting from `LabelStatistics()`.

    Args:
        labels: number of labels.
        empty: number of labels without a known pixel.
        pixels: number of pixels in all labels.
        ignored: number of pixels with an unknown value.
        classes: name of a class → number of its pixels, for every class of the task; "no" and "yes" for masks; empty for
            tasks without classes.
        lowest: lowest known value, only for depth; infinity without any.
        highest: highest known value, only for depth; minus infinity without any.
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

    Args:
        weight: factor of this task's loss in the total loss, 0 or more.

    Raises:
        ValueError: the weight is negative or not finite.
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
    """Meaning of a prediction's value, with its unit and range, in words."""
    map_unit: str = ""
    """Unit of a prediction's values."""
    colours: ClassVar[str] = ""
    """Meaning of the colours of `draw`, in words, if they do not stand for classes."""
    label_channels: ClassVar[int] = 1
    label_dtype: ClassVar[torch.dtype] = torch.uint8
    ignored_remedy: ClassVar[str] = ""
    """Remedy if ignored pixels may be meant as a class that no label holds."""

    channels: int
    """Number of maps the network outputs for this task."""

    def __init__(self, *, weight: float = 1.0):
        self.weight = float(weight)
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"task '{self.name}': weight is {weight}, expected a number of 0 or more")

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Keyword arguments with which `create_task(self.name, **options)` builds this task again.

        Returns:
            Option → JSON value.
        """

    # -- the label and its way through the transforms ------------------------------------------------------------------

    @abstractmethod
    def read(self, path: Path) -> Tensor:
        """Read a label file of the folder layout.

        Args:
            path: the file.

        Returns:
            (label_channels, H, W) label of `label_dtype`.

        Raises:
            LabelError: the file is not a label of this task.
        """

    def resample(self, label: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize a label by nearest neighbour, source index ⌊i·h/H⌋ (as OpenCV's INTER_NEAREST).

        Args:
            label: (c, h, w).
            size: new height and width (H, W).

        Returns:
            (c, H, W) label.
        """
        rows, columns = (torch.from_numpy(nearest_index(label.shape[i - 2], size[i])) for i in (0, 1))
        return label.index_select(-2, rows).index_select(-1, columns)

    def flip(self, label: Tensor) -> Tensor:
        """Mirror a label left to right, including its values (a normal's x changes sign).

        Args:
            label: (c, H, W).

        Returns:
            (c, H, W) label.
        """
        return label.flip(-1)

    def rescale(self, label: Tensor, factor: float) -> Tensor:
        """Adapt a label's values to a zoom of its image (protocol: depth is divided by the factor).

        Args:
            label: (c, H, W).
            factor: zoom of the image, above 0; 2 doubles its size.

        Returns:
            (c, H, W) label.
        """
        return label

    def finish(self, label: Tensor) -> Tensor:
        """Apply the rules that depend on the whole label after cropping and padding (protocol §1.4).

        Args:
            label: (c, H, W).

        Returns:
            (c, H, W) label.
        """
        return label

    def missing(self, size: tuple[int, int]) -> Tensor:
        """The label of an image that has none: every pixel is ignored.

        Args:
            size: height and width (H, W).

        Returns:
            (label_channels, H, W) label.
        """
        return torch.full((self.label_channels, *size), self.ignore, dtype=self.label_dtype)

    def statistics(self, label: Tensor) -> LabelStatistics:
        """Count the values of one label.

        Args:
            label: (c, H, W) as `read` returns it.

        Returns:
            The counts of this label.
        """
        valid = self.valid(label)
        ignored = valid.numel() - int(valid.sum())
        return LabelStatistics(1, int(ignored == valid.numel()), valid.numel(), ignored, self.class_pixels(label))

    def class_pixels(self, label: Tensor) -> dict[str, int]:
        """Count the pixels of each class.

        Args:
            label: (c, H, W).

        Returns:
            Name of a class → number of its pixels; empty for tasks without classes.
        """
        return {}

    def describe(self, found: LabelStatistics) -> str:
        """Describe the content of labels: the classes' shares of the known pixels, the range of values, the ignored share.

        Args:
            found: counts of the labels.

        Returns:
            One line of text.
        """
        known = max(found.pixels - found.ignored, 1)
        shares = ", ".join(f"{name} {percent(count / known)}" for name, count in found.classes.items())
        ignored = f"{percent(found.ignored_share)} of the pixels ignored"
        return f"{shares}; {ignored}" if shares else ignored

    def remarks(self, found: LabelStatistics) -> list[str]:
        """List what is doubtful in labels, each with its remedy.

        Args:
            found: counts of the labels.

        Returns:
            Sentences; empty if nothing is doubtful or there are no labels.
        """
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
        """Mark the pixels whose value is known.

        Args:
            label: (..., c, H, W).

        Returns:
            (..., 1, H, W) bool, False where every channel is `ignore`.
        """
        return (label != self.ignore).any(-3, keepdim=True)

    def counts(self, label: Tensor) -> Tensor:
        """The sums that normalise the loss.

        The counts of several batches or processes add up to those of the joint batch. A loss that is split over processes or
        micro-batches therefore equals the loss of the joint batch.

        Args:
            label: (B, c, H, W).

        Returns:
            int64 vector, the number of valid pixels first.
        """
        return self.valid(label).sum()[None]

    @abstractmethod
    def loss(self, logits: Tensor, label: Tensor, counts: Tensor | None = None) -> Tensor:
        """The unweighted loss: the sum over valid pixels divided by max(counts[0], 1).

        Args:
            logits: (B, channels, H, W) float.
            label: (B, c, H, W).
            counts: `counts` of the joint batch if this batch is a part of it; None for those of this batch.

        Returns:
            Scalar. If every pixel is ignored, it is 0 and still has a gradient path.
        """

    @abstractmethod
    def metric(self) -> Metric:
        """The metric of a whole data set.

        Returns:
            A torchmetrics metric with `update(logits, label)` and `compute() → {name: 0-d tensor}`. Its states are reduced by
            sum. `update` raises NonFiniteError for logits with NaN or infinite values.
        """

    def quick_metric(self) -> Metric:
        """The metric of evaluations during training. It differs from `metric` if that takes long.

        Returns:
            A torchmetrics metric as `metric` returns it.
        """
        return self.metric()

    def titled(self, metric: str) -> str:
        """A metric's name with its unit, e.g. "RMSE, m".

        Args:
            metric: key of a score of this task.

        Returns:
            The heading of its column in a table.
        """
        unit = self.units.get(metric.partition("/")[0])
        return f"{metric}, {unit}" if unit else metric

    @property
    def image_score(self) -> str:
        """Description of `score_image`, in words."""
        return self.quick_score or self.score

    def score_image(self, logits: Tensor, label: Tensor) -> float:
        """The score of one image, by which reports rank images; by default `quick_metric` of this image.

        Args:
            logits: (1, channels, H, W).
            label: (1, c, H, W).

        Returns:
            The score; NaN if the label does not define one.
        """
        return float(self.quick_metric().to(logits.device)(logits, label)[self.quick_score or self.score])

    # -- predictions -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def decode(self, logits: Tensor) -> Tensor:
        """Convert logits to predictions, pixel by pixel.

        Args:
            logits: (B, channels, H, W).

        Returns:
            (B, H, W) or (B, H, W, 3) predictions in the task's unit.
        """

    @abstractmethod
    def truth(self, label: Tensor) -> Tensor:
        """Convert a label to the form of a prediction.

        Args:
            label: (c, H, W).

        Returns:
            (H, W) or (H, W, 3), as from `decode`; ignored pixels hold any value.
        """

    @abstractmethod
    def draw(
        self, prediction: np.ndarray, *, valid: np.ndarray | None = None, reference: np.ndarray | None = None
    ) -> np.ndarray:
        """Draw a prediction in colours.

        Args:
            prediction: (H, W) or (H, W, 3), or some rows of it.
            valid: (H, W) bool; pixels with False are painted mid-grey.
            reference: map whose range of values sets the colour scale, so that a prediction and its truth are comparable. It is
                also needed to draw some rows as in the whole. Tasks with a fixed scale ignore it.

        Returns:
            (H, W, 3) uint8 RGB.
        """

    def scale(self, values: np.ndarray) -> tuple[float, float] | None:
        """The range of values over which `draw` spreads its colours if `values` is its reference.

        Args:
            values: a map as `draw` takes it.

        Returns:
            Lowest and highest value; None if the colours do not follow the range of the values, or no value is known.
        """
        return None

    @abstractmethod
    def label_file(self, prediction: np.ndarray) -> tuple[str, bytes]:
        """Write a prediction as a label file of the folder layout. `read` reads it back, to the precision of that file.

        Args:
            prediction: (H, W) or (H, W, 3).

        Returns:
            The file's suffix, one of `suffixes`, and its content.
        """


MOSTLY = 0.9
"""A larger share of ignored pixels is reported in a note."""


def percent(share: float) -> str:
    """0 to 1 → "12.3 %"; a small share above 0 does not become 0."""
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

    Args:
        name: name of the task, e.g. "depth".
        **options: arguments of the task's class.

    Returns:
        The task.

    Raises:
        ValueError: the name or an option is unknown, or an option's value has the wrong type. The message lists the known
            ones.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task '{name}'; known tasks: {', '.join(sorted(TASKS))}")
    known = option_defaults(name)
    hints: dict[str, Any] = {}
    with suppress(NameError):  # a task from elsewhere may name a type that it imports only for type checkers
        hints = typing.get_type_hints(TASKS[name].__init__)
    for option in options:
        if option not in known:
            near = get_close_matches(option, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            listed = ", ".join(key for key in known if key != "weight") or "none"
            raise ValueError(f"task '{name}' has no option '{option}'.{hint} Its options: {listed}")
    return TASKS[name](**{key: _option(name, key, value, hints.get(key)) for key, value in options.items()})


def list_tasks() -> list[str]:
    """All registered tasks.

    Returns:
        Their names, sorted.
    """
    return sorted(TASKS)


def option_defaults(name: str) -> dict[str, Any]:
    """Options of a registered task.

    Args:
        name: name of the task.

    Returns:
        Option → default value.
    """
    return {key: value.default for key, value in signature(TASKS[name]).parameters.items()}


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def _option(task: str, name: str, value: Any, hint: Any) -> Any:
    """The value, as one of the plain kinds that `hint` allows; with other hints, the task itself checks it.

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
