"""Scores of one task on a split: metrics at the frame's and at the images' own size, and the validation loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pamm.data.sample import Box
from pamm.models.model import resize_rows
from pamm.runtime.distributed import summed
from pamm.tasks import Task

Row = dict[str, dict[str, float]]
"""Task name → metric name → value. Percent where the field prints percent, NaN where no image has the label."""

Resolution = Literal["frame", "original"]
"""Resolution of the comparison: the padded frame, as in the papers, or every image's own size."""

RESOLUTIONS: tuple[Resolution, ...] = ("frame", "original")

SIGNIFICANT_DIGITS = 6
STRIP_VALUES = 2**24
"""Number of logits that are resized to an image's own size at once."""


@dataclass(frozen=True)
class ImageResult:
    """One image, what the network made of it and what is known of it.

    image: (3, H, W) normalised. labels: task → (1, c, h, w), all ignored where there is none. logits: task → (1, channels,
    h, w). size: of the image as read. box: where it lies in the frame of (h, w). original: task → (c, *size), the labels at
    its own size; box and original may be absent (see `Sample`).
    """

    id: str
    image: Tensor
    labels: Mapping[str, Tensor]
    logits: Mapping[str, Tensor]
    size: tuple[int, int]
    box: Box | None = None
    original: Mapping[str, Tensor] | None = None

    @property
    def resized(self) -> bool:
        """Whether the frame holds the image at another size than its own."""
        return self.box is not None and tuple(self.box[2:]) != tuple(self.size)


class TaskScores:
    """One task's scores over a split, at one or both resolutions.

    An image that the frame holds at its own size is measured once for both: inside the padding, which is ignored, its
    labels and logits are the same ones.
    """

    def __init__(
        self,
        task: Task,
        resolutions: Sequence[Resolution] = ("frame",),
        *,
        device: torch.device | str = "cpu",
        quick: bool = False,
    ):
        self.task = task
        self.resolutions = tuple(resolutions)
        self.device = device
        names = self.resolutions if len(self.resolutions) == 1 else ("both", *self.resolutions)
        self.metrics = {name: (task.quick_metric() if quick else task.metric()).to(device) for name in names}
        self.loss = LossMean(task)

    def update(self, result: ImageResult) -> None:
        """Count one image. Raises NonFiniteError for logits that are not finite."""
        logits, label = result.logits[self.task.name], result.labels[self.task.name]
        if "frame" in self.metrics:
            shared = "both" in self.metrics and not result.resized
            self.metrics["both" if shared else "frame"].update(logits, label)
            self.loss.update(logits, label)
        if "original" in self.metrics and ("both" not in self.metrics or result.resized):
            self._update_original(result)

    def _update_original(self, result: ImageResult) -> None:
        """The logits of the image without padding, resized to its own size (as `Predictor` does) and measured there."""
        assert (
            result.original is not None and result.box is not None
        )  # `EvalTransform` sets them where `original` is on
        label = result.original.get(self.task.name)
        if label is None:
            return
        top, left, height, width = result.box
        logits = result.logits[self.task.name][..., top : top + height, left : left + width]
        label = label[None].to(logits.device)
        rows = max(1, STRIP_VALUES // (logits.shape[1] * result.size[1])) if self.task.pixelwise else result.size[0]
        for start in range(0, result.size[0], rows):
            strip = range(start, min(start + rows, result.size[0]))
            part = label[..., strip.start : strip.stop, :]
            self.metrics["original"].update(resize_rows(logits, result.size, strip), part)

    def compute(self) -> dict[Resolution, dict[str, float]]:
        """Resolution → metric → value over all processes' images, and at the frame's the loss; 6 significant digits."""
        values = {}
        for name in self.resolutions:
            metric = self.metrics[name]
            if "both" in self.metrics:
                metric.merge_state(self.metrics["both"])
            values[name] = {key: significant(float(value)) for key, value in metric.compute().items()}
        if "frame" in values:
            values["frame"]["loss"] = significant(self.loss.compute(self.device))
        return values


class LossMean:
    """The validation loss of one task: Σ over images of loss · valid pixels / Σ valid pixels."""

    def __init__(self, task: Task):
        self.task = task
        self.sums = torch.zeros(2, dtype=torch.float64)

    def update(self, logits: Tensor, label: Tensor) -> None:
        """One image, (1, channels, H, W) and (1, c, H, W); loss balancing, where a task has it, is per image."""
        count = self.task.counts(label)[0].cpu()
        if count > 0:
            self.sums += torch.stack([self.task.loss(logits, label).double().cpu() * count, count.double()])

    def compute(self, device: torch.device | str) -> float:
        """The mean over all processes' images; NaN without any label, infinity where the network's output is not finite."""
        sums = summed(self.sums.to(device))
        if sums[1] == 0:
            return math.nan
        mean = float(sums[0] / sums[1])
        return mean if math.isfinite(mean) else math.inf


def significant(value: float) -> float:
    """Rounded to 6 significant digits, below which the order of float32 sums shows."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
