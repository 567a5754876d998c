"""Salient object detection."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pamm.tasks.metrics import Sums, sum_metric
from pamm.tasks.pictures import grey_picture, mask_pixels, probability_png, read_mask
from pamm.tasks.scores import best_f_measure, full_precision, mean_over, threshold_counts
from pamm.tasks.task import Task, register

if TYPE_CHECKING:
    from torchmetrics import Metric

THRESHOLDS = torch.arange(0.05, 1, 0.05)
"""The benchmark's 19 thresholds of the saliency probability, 0.05 to 0.95."""

BETA2 = 0.3
"""β² of the F-measure: precision weighs more than recall."""


@register
class Saliency(Task):
    """Whether a pixel belongs to the salient object. Label 1 or 0, 255 ignored; prediction (H, W) probability.

    `soft`: label files are maps of probabilities, of which more than half is a yes.
    Loss: cross entropy of a two-way softmax in which each class weighs the share of the other one in the joined batch.
    """

    name = "sal"
    score = "maxF"
    units: ClassVar = {"maxF": "%", "maxF_released": "%"}
    meaning = "probability that a pixel belongs to the salient object, 0 to 1"
    colours = "probability of an object, black 0 to white 1"
    higher_is_better = True
    ignore = 255
    channels = 2

    def __init__(self, *, soft: bool = False, weight: float = 1.0):
        super().__init__(weight=weight)
        self.soft = bool(soft)

    def options(self) -> dict[str, Any]:
        return {"weight": self.weight} | ({"soft": True} if self.soft else {})

    def read(self, path: Path) -> Tensor:
        """Grey PNG of 0 and 255 → (1, H, W) uint8, 1 where it is 255, see `read_mask`. Raises LabelError."""
        return torch.from_numpy(read_mask(path, soft=self.soft))[None]

    def class_pixels(self, label: Tensor) -> dict[str, int]:
        return mask_pixels(label)

    def counts(self, label: Tensor) -> Tensor:
        """(valid pixels, negative pixels): the second gives the class weights."""
        return torch.stack([(label != self.ignore).sum(), (label == 0).sum()])

    def loss(self, logits: Tensor, label: Tensor, counts: Tensor | None = None) -> Tensor:
        counts = self.counts(label) if counts is None else counts
        logits, target = full_precision(logits), label[:, 0].long()
        positive = mean_over(counts[1], counts).to(logits)
        weights = torch.stack([1 - positive, positive])
        total = F.cross_entropy(logits, target, weights, ignore_index=int(self.ignore), reduction="sum")
        return mean_over(total, counts)

    def metric(self) -> Metric:
        """Largest F-measure (β² = 0.3) over the thresholds of the whole set, percent, in two readings.

        maxF: thresholds 0.05, 0.10 … 0.95 of the probability. maxF_released: what the published code of InvPT and its
        descendants computes, a second sigmoid on the probability, which leaves five distinct thresholds.
        """
        bins = torch.zeros(2, len(THRESHOLDS) + 1, dtype=torch.int64)
        return sum_metric(self.name, self._measure, self._scores, {"counts": bins, "counts_released": bins.clone()})

    def _measure(self, logits: Tensor, label: Tensor) -> Sums:
        probability, positive, valid = self.decode(logits), label[:, 0] == 1, label[:, 0] != self.ignore
        return {
            "counts": threshold_counts(probability, positive, valid, THRESHOLDS),
            "counts_released": threshold_counts(probability.sigmoid(), positive, valid, THRESHOLDS),
        }

    def _scores(self, sums: Sums) -> Sums:
        return {
            "maxF": best_f_measure(sums["counts"], BETA2),
            "maxF_released": best_f_measure(sums["counts_released"], BETA2),
        }

    def score_image(self, logits: Tensor, label: Tensor) -> float:
        """As every task's; NaN without any pixel of an object, where F is 0 whatever is predicted."""
        return super().score_image(logits, label) if (label == 1).any() else math.nan

    def decode(self, logits: Tensor) -> Tensor:
        return full_precision(logits).softmax(1)[:, 1]

    def truth(self, label: Tensor) -> Tensor:
        return (label[0] == 1).float()

    def draw(
        self, prediction: np.ndarray, *, valid: np.ndarray | None = None, reference: np.ndarray | None = None
    ) -> np.ndarray:
        """Salient pixels white on black."""
        return grey_picture(prediction, valid)

    def label_file(self, prediction: np.ndarray) -> tuple[str, bytes]:
        """8-bit grey PNG, 255 times the probability, noted as such, so that it reads back as a mask (`read_mask`)."""
        return ".png", probability_png(prediction)
