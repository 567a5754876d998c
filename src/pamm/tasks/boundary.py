"""Object boundary detection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pamm.tasks.metrics import Sums, sum_metric
from pamm.tasks.pictures import grey_picture, read_mask, save_grey
from pamm.tasks.scores import best_f_measure, full_precision, mean_over, threshold_counts
from pamm.tasks.task import Task, register

if TYPE_CHECKING:
    from torchmetrics import Metric

THRESHOLDS = torch.arange(1, 100) / 100
"""Thresholds of the boundary probability, 0.01 to 0.99."""


@register
class Boundary(Task):
    """Whether an object's boundary runs through a pixel. Label 1 or 0, 255 ignored; prediction (H, W) probability.

    `positive_weight` w in (0, 1): the loss is −[w·y·log σ(x) + (1 − w)·(1 − y)·log(1 − σ(x))].
    """

    name = "edge"
    score = "maxF_pixel"
    higher_is_better = True
    ignore = 255
    channels = 1

    def __init__(self, *, positive_weight: float = 0.95, weight: float = 1.0):
        super().__init__(weight=weight)
        if not 0 < positive_weight < 1:
            raise ValueError(f"task 'edge': positive_weight is {positive_weight}, expected a number between 0 and 1")
        self.positive_weight = float(positive_weight)

    def options(self) -> dict[str, Any]:
        return {"positive_weight": self.positive_weight, "weight": self.weight}

    def read(self, path: Path) -> Tensor:
        """8-bit grey PNG → (1, H, W) uint8, 1 where the value is above 127. Raises LabelError."""
        return read_mask(path)

    def loss(self, logits: Tensor, label: Tensor, counts: Tensor | None = None) -> Tensor:
        logits, positive = full_precision(logits), label == 1
        weight = torch.where(positive, self.positive_weight, 1 - self.positive_weight) * (label != self.ignore)
        total = -(weight * F.logsigmoid(torch.where(positive, logits, -logits))).sum()
        return mean_over(total, self.counts(label) if counts is None else counts)

    def metric(self) -> Metric:
        """maxF_pixel: largest F1 over 99 thresholds for the whole set, percent.

        A predicted pixel is right only where the label marks that very pixel, without the tolerance, thinning and
        matching of the benchmark's odsF: it is far lower than odsF and not comparable with it.
        """
        empty = {"bins": torch.zeros(2, len(THRESHOLDS) + 1, dtype=torch.int64)}
        return sum_metric(self.name, self._measure, self._scores, empty)

    def _measure(self, logits: Tensor, label: Tensor) -> Sums:
        probability, valid = full_precision(logits).sigmoid(), label != self.ignore
        return {"bins": threshold_counts(probability, label == 1, valid, THRESHOLDS)}

    def _scores(self, sums: Sums) -> Sums:
        return {"maxF_pixel": best_f_measure(sums["bins"], 1.0)}

    def decode(self, logits: Tensor) -> Tensor:
        return full_precision(logits)[:, 0].sigmoid()

    def truth(self, label: Tensor) -> Tensor:
        return (label[0] == 1).float()

    def draw(
        self, prediction: np.ndarray, *, valid: np.ndarray | None = None, reference: np.ndarray | None = None
    ) -> np.ndarray:
        """Boundaries dark on white."""
        return grey_picture(1 - np.asarray(prediction, np.float32), valid)

    def save_png(self, prediction: np.ndarray, path: Path) -> None:
        """8-bit grey PNG, 255 times the probability."""
        save_grey(prediction, path)
