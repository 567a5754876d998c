"""Surface normal estimation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pamm.tasks.metrics import Sums, sum_metric
from pamm.tasks.pictures import by_strips, paint, png_bytes, read_png, to_byte
from pamm.tasks.scores import full_precision, mean_over
from pamm.tasks.task import Task, register

if TYPE_CHECKING:
    from torchmetrics import Metric

BIN = 0.01
"""Degrees; width of a bin of the histogram from which the median is read."""

BOUNDS = (11.25, 22.5, 30.0)
"""Degrees; errors below these are counted."""

TOLERANCE = 0.2
"""A pixel of a label whose vector is longer or shorter than 1 by more is unknown: (0, 0, 0), white, and grey (127 or 128).

Unit vectors in 8 bits are off by 0.007, by 0.014 where the values were cut off and not rounded; the mean of two directions
less than 73° apart, as resizing a map makes it, is shorter than 1 by less than the tolerance.
"""


@register
class Normals(Task):
    """Surface normal of every pixel: x right, y up, z towards the viewer; ignored pixels 255 in all three channels.

    Prediction: (H, W, 3) unit vectors. Loss: the L1 distance of the normalised output to the label, per pixel.
    """

    name = "normals"
    score = "mErr"
    units: ClassVar = {"mErr": "°", "median": "°", "RMSE": "°"} | {f"within_{bound:g}": "%" for bound in BOUNDS}
    meaning = "surface normal of a pixel, a unit vector: x to the right, y up, z towards the viewer, each -1 to 1"
    colours = "red x to the right, green y up, blue z towards the viewer, dark -1 to bright 1"
    higher_is_better = False
    ignore = 255
    label_channels = 3
    label_dtype = torch.float32
    channels = 3

    def options(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def read(self, path: Path) -> Tensor:
        """8-bit RGB PNG, n = v / 127.5 − 1, unknown as `TOLERANCE` says → (3, H, W) float32. Raises LabelError."""
        values = torch.from_numpy(read_png(path, {"RGB": (8,)}, "an 8-bit RGB PNG of normals, (0, 0, 0) = unknown"))
        normals = values.permute(2, 0, 1) / 127.5 - 1
        known = (normals.norm(dim=0) - 1).abs() <= TOLERANCE
        return torch.where(known, normals, self.ignore)

    def flip(self, label: Tensor) -> Tensor:
        """Mirror the label; x changes its sign."""
        mirrored = super().flip(label)
        sign = torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
        return torch.where(self.valid(mirrored), mirrored * sign, mirrored)

    def finish(self, label: Tensor) -> Tensor:
        """Zero vectors, which some data sets hold where the normal is unknown, become ignored."""
        return torch.where((label == 0).all(-3, keepdim=True), self.ignore, label)

    def loss(self, logits: Tensor, label: Tensor, counts: Tensor | None = None) -> Tensor:
        error = (F.normalize(full_precision(logits), dim=1, eps=1e-6) - label).abs()
        total = torch.where(self.valid(label), error, 0).sum()
        return mean_over(total, self.counts(label) if counts is None else counts)

    def metric(self) -> Metric:
        """Angles between prediction and truth over all pixels of the set, degrees: mErr (mean), median (from a
        histogram of 0.01° bins, to that precision) and RMSE; within_11.25, within_22.5, within_30: percent of pixels below.
        """
        empty = {
            "angle": torch.zeros((), dtype=torch.float64),
            "square": torch.zeros((), dtype=torch.float64),
            "close": torch.zeros(len(BOUNDS), dtype=torch.int64),
            "bins": torch.zeros(round(180 / BIN), dtype=torch.int64),
        }
        return sum_metric(self.name, self._measure, self._scores, empty)

    def _measure(self, logits: Tensor, label: Tensor) -> Sums:
        valid = self.valid(label)[:, 0]
        guess = F.normalize(logits.movedim(1, -1)[valid].double(), dim=-1)
        truth = F.normalize(label.movedim(1, -1)[valid].double(), dim=-1)
        angle = torch.rad2deg(2 * torch.atan2((guess - truth).norm(dim=-1), (guess + truth).norm(dim=-1)))
        last = round(180 / BIN) - 1
        return {
            "angle": angle.sum(),
            "square": angle.square().sum(),
            "close": torch.stack([(angle < bound).sum() for bound in BOUNDS]),
            "bins": torch.bincount((angle / BIN).long().clamp(max=last), minlength=last + 1),
        }

    def _scores(self, sums: Sums) -> Sums:
        count = sums["bins"].sum()
        shares = {f"within_{bound:g}": 100 * n / count for bound, n in zip(BOUNDS, sums["close"].double(), strict=True)}
        means = {"mErr": sums["angle"] / count, "median": histogram_median(sums["bins"])}
        return means | {"RMSE": (sums["square"] / count).sqrt()} | shares

    def decode(self, logits: Tensor) -> Tensor:
        return F.normalize(full_precision(logits), dim=1).movedim(1, -1)

    def truth(self, label: Tensor) -> Tensor:
        return label.movedim(0, -1)

    def draw(
        self, prediction: np.ndarray, *, valid: np.ndarray | None = None, reference: np.ndarray | None = None
    ) -> np.ndarray:
        """The components (x, y, z) as (red, green, blue), −1 black to 1 bright."""
        return paint(encode(prediction), valid)

    def label_file(self, prediction: np.ndarray) -> tuple[str, bytes]:
        """8-bit RGB PNG, v = 127.5·(n + 1), rounded."""
        return ".png", png_bytes(encode(prediction))


def encode(normals: np.ndarray) -> np.ndarray:
    """(H, W, 3) in [−1, 1] → uint8."""
    return by_strips(lambda part: to_byte((np.asarray(part, np.float32) + 1) / 2), normals)


def histogram_median(bins: Tensor) -> Tensor:
    """Median of the values counted in bins of width `BIN` from 0, linear within its bin; NaN without any value."""
    below = bins.double().cumsum(0)
    half = below[-1] / 2
    at = (below < half).sum().clamp(max=len(bins) - 1)
    median = (at + (half - below[at]) / bins[at] + 1) * BIN
    return torch.where(half > 0, median, torch.nan)
