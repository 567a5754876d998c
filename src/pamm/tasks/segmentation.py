"""Semantic segmentation, and what every task whose label is a map of class indices shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pamm.tasks.metrics import Sums, sum_metric
from pamm.tasks.pictures import INDICES, class_palette, paint, png_bytes, read_png
from pamm.tasks.scores import full_precision, mean_over
from pamm.tasks.task import LabelError, Task, register

if TYPE_CHECKING:
    from torchmetrics import Metric

PALETTE = class_palette()

# fmt: off
PASCAL_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on


class ClassMap(Task):
    """A label that holds one class index per pixel, 255 where it is ignored.

    `classes` are the names, in the order of the indices. Loss: softmax cross entropy. Prediction: (H, W) uint8 index.
    Raises ValueError for fewer than 2 or more than 255 classes, an empty name, one that occurs twice or is no text.
    """

    score = "mIoU"
    meaning = "class of a pixel, an index of the classes"
    units: ClassVar = {"mIoU": "%", "pixel_accuracy": "%", "IoU": "%"}
    higher_is_better = True
    ignore = 255
    ignored_remedy = (
        "255 means ignored: where it stands for a class, write that class's index in its place (of two classes, 1)."
    )
    default_classes: ClassVar[Sequence[str]]

    def __init__(self, *, classes: Sequence[str] | None = None, weight: float = 1.0):
        super().__init__(weight=weight)
        classes = self.default_classes if classes is None else classes
        check_classes(self.name, classes)
        self.classes = list(classes)
        self.channels = len(self.classes)

    def options(self) -> dict[str, Any]:
        return {"classes": list(self.classes), "weight": self.weight}

    def read(self, path: Path) -> Tensor:
        """Grey or palette PNG of up to 8 bits, class indices as stored → (1, H, W) uint8. Raises LabelError."""
        index = read_png(path, INDICES, "an 8-bit grey or palette PNG of class indices, 255 = ignored")
        wrong = (index >= self.channels) & (index != self.ignore)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise LabelError(
                f"{path}: class index {index[row, column]} at row {row}, column {column}, but {self.name} has "
                f"{self.channels} classes (0 to {self.channels - 1}; 255 = ignored); correct the label, or list every "
                "class of the data set"
            )
        return torch.from_numpy(index)[None]

    def class_pixels(self, label: Tensor) -> dict[str, int]:
        found = torch.bincount(label.flatten(), minlength=256).tolist()
        return dict(zip(self.classes, found, strict=False))

    def loss(self, logits: Tensor, label: Tensor, counts: Tensor | None = None) -> Tensor:
        target = label[:, 0].long()
        total = F.cross_entropy(full_precision(logits), target, ignore_index=int(self.ignore), reduction="sum")
        return mean_over(total, self.counts(label) if counts is None else counts)

    def metric(self) -> Metric:
        """mIoU, pixel_accuracy and IoU/<class>, percent, from the confusion matrix of the whole set.

        A class in neither labels nor predictions counts as 0 in the mean.
        """
        empty = {"confusion": torch.zeros(self.channels, self.channels, dtype=torch.int64)}
        return sum_metric(self.name, self._measure, self._scores, empty)

    def _measure(self, logits: Tensor, label: Tensor) -> Sums:
        """Confusion matrix (label, prediction) of a batch."""
        valid = label[:, 0] != self.ignore
        truth, guess = label[:, 0][valid].long(), logits.argmax(1)[valid]
        pairs = torch.bincount(truth * self.channels + guess, minlength=self.channels**2)
        if len(pairs) > self.channels**2:
            raise LabelError(
                f"{self.name}: a label holds class index {int(truth.max())}, but there are {self.channels} classes; "
                "list every class of the data set, or set such pixels to 255"
            )
        return {"confusion": pairs.reshape(self.channels, self.channels)}

    @property
    def image_score(self) -> str:
        return "mIoU of the classes that occur"

    def score_image(self, logits: Tensor, label: Tensor) -> float:
        """Mean IoU, percent, over the classes in the image's label or prediction: absent ones say nothing about it."""
        confusion = self._measure(logits, label)["confusion"].double()
        hits = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - hits
        return float((100 * hits / union)[union > 0].mean())

    def _scores(self, sums: Sums) -> Sums:
        confusion = sums["confusion"].double()
        hits, total = confusion.diagonal(), confusion.sum()
        union = confusion.sum(0) + confusion.sum(1) - hits
        iou = torch.where(total > 0, 100 * hits / union.clamp(min=1), torch.nan)
        scores = {"mIoU": iou.mean(), "pixel_accuracy": 100 * hits.sum() / total}
        return scores | {f"IoU/{name}": value for name, value in zip(self.classes, iou, strict=True)}

    def decode(self, logits: Tensor) -> Tensor:
        return logits.argmax(1).to(torch.uint8)

    def truth(self, label: Tensor) -> Tensor:
        return label[0]

    def draw(
        self, prediction: np.ndarray, *, valid: np.ndarray | None = None, reference: np.ndarray | None = None
    ) -> np.ndarray:
        """Colours of PASCAL VOC; ignored pixels mid-grey."""
        return paint(PALETTE[np.asarray(prediction, np.uint8)], valid)

    def label_file(self, prediction: np.ndarray) -> tuple[str, bytes]:
        """8-bit grey PNG of class indices."""
        return ".png", png_bytes(np.asarray(prediction, np.uint8))


def numbered_classes(count: int) -> list[str]:
    """Names for classes of which only the number is known."""
    return [f"class {index}" for index in range(count)]


def check_classes(task: str, classes: Sequence[str]) -> None:
    """Raise ValueError unless `classes` is a list of 2 to 255 different names."""
    if not isinstance(classes, Sequence) or isinstance(classes, (str, bytes)):
        raise ValueError(f"task '{task}': classes is {classes!r}, expected a list of names, e.g. [sky, tree, road]")
    unquoted = [c for c in classes if not isinstance(c, str)]
    if unquoted:
        raise ValueError(
            f"task '{task}': classes holds {unquoted}, which YAML does not take for text; put these names into quotes"
        )
    if not 2 <= len(classes) <= 255:
        raise ValueError(f"task '{task}': {len(classes)} classes, expected 2 to 255 (index 255 marks ignored pixels)")
    names = [c.strip() for c in classes]
    wrong = [c for i, c in enumerate(classes) if not names[i] or names[i] in names[:i]]
    if wrong:
        raise ValueError(f"task '{task}': classes must be different, non-empty names; rename {wrong}")


@register
class SemanticSegmentation(ClassMap):
    """The class of every pixel. Default classes: PASCAL's 20 and background."""

    name = "semseg"
    balances_crops = True
    default_classes = PASCAL_CLASSES
