"""Object boundary detection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pamm.tasks.metrics import Sums, image_metric, sum_metric
from pamm.tasks.pictures import grey_picture, mask_pixels, probability_png, read_mask
from pamm.tasks.scores import best_f_measure, full_precision, mean_over, threshold_counts
from pamm.tasks.task import LabelStatistics, Task, percent, register

if TYPE_CHECKING:
    from torchmetrics import Metric

MOST_LINES = 0.5
"""Share of a label's pixels that boundaries take at most; they take 0.06 of BSDS's annotations."""

THRESHOLDS = torch.arange(1, 100) / 100
"""Thresholds of the boundary probability, 0.01 to 0.99."""


@dataclass(frozen=True)
class BoundaryProtocol:
    """How a benchmark turns a predicted map into lines (protocol §5.6)."""

    thresholds: tuple[float, ...]
    strict: bool
    """A pixel counts where its value is above the threshold; else from the threshold on."""
    radius: int
    """Of the non-maximum suppression, pixels."""
    smoothing: int
    """Radius of the triangle filter before it, pixels; 0 for none."""
    stored: bool
    """Whether the suppressed map is rounded to 8 bits again."""


_HUNDREDTHS = tuple(k / 100 for k in range(1, 100))

PROTOCOLS = {
    "bdet": BoundaryProtocol((0.001, *_HUNDREDTHS, 0.999), strict=True, radius=1, smoothing=0, stored=False),
    "seism": BoundaryProtocol(_HUNDREDTHS, strict=False, radius=4, smoothing=1, stored=True),
    "bsds": BoundaryProtocol(_HUNDREDTHS, strict=False, radius=1, smoothing=1, stored=True),
}
"""Protocols by name. "bdet": the numbers of InvPT, TaskPrompter, MTMamba, MLoRE and PAMM. Do not mix them."""


def counts(
    probability: np.ndarray,
    truths: Sequence[np.ndarray],
    *,
    thresholds: Sequence[float] | np.ndarray,
    max_distance: float,
    nms: int | bool = False,
    smoothing: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Counts of the boundary benchmark on one image (protocol §5.6).

    At every threshold t the map probability ≥ t is thinned to lines one pixel wide. Its pixels are paired one to one with
    those of each annotator's map, so that as many as possible have a partner within reach.

    Args:
        probability: (H, W) of a boundary, in [0, 1].
        truths: the annotators' maps, (H, W) bool each, lines one pixel wide.
        thresholds: any numbers; for the map probability > t give `numpy.nextafter(t, 2)`.
        max_distance: reach of a pair, as a fraction of the image's diagonal (0.0075 PASCAL and BSDS, 0.011 NYUD).
        nms: radius of the non-maximum suppression to do first, pixels; True for 1, False or None where that was done.
        smoothing: radius of a triangle filter to apply before that, pixels; 0 for none.

    Returns:
        cntR, sumR, cntP, sumP, int64, one number per threshold. cntR: true pixels with a partner, of sumR, over all
        annotators. cntP: predicted pixels with a partner in any annotator's map, of sumP.

    Raises ValueError for maps of other shapes or values, no truth, no threshold, or a negative distance. Needs scipy.
    """
    from pamm.tasks.metrics.correspondence import image_counts, suppress

    probability = np.asarray(probability, dtype=np.float64)
    levels = np.asarray(thresholds, dtype=np.float64)
    lines = [np.asarray(truth).astype(bool) for truth in truths]
    _check_counts(probability, lines, levels, max_distance)
    if nms:
        probability = suppress(probability, int(nms), smoothing)
    return tuple(image_counts(probability, lines, levels, max_distance))


def _check_counts(probability: np.ndarray, truths: list[np.ndarray], thresholds: np.ndarray, distance: float) -> None:
    if probability.ndim != 2 or not probability.size:
        raise ValueError(f"probability: found shape {probability.shape}, expected (height, width)")
    if not (probability.min() >= 0 and probability.max() <= 1):
        raise ValueError(
            f"probability: found values from {probability.min():g} to {probability.max():g}, expected 0 to 1; divide 8-bit "
            "maps by 255 and apply a sigmoid to logits"
        )
    if not truths or any(truth.shape != probability.shape for truth in truths):
        raise ValueError(
            f"truths: found shapes {[truth.shape for truth in truths]}, expected one or more of {probability.shape}"
        )
    if thresholds.ndim != 1 or not len(thresholds) or not np.isfinite(thresholds).all():
        raise ValueError(f"thresholds: found {thresholds}, expected one or more numbers")
    if not 0 <= distance < 1:
        raise ValueError(f"max_distance: found {distance}, expected a fraction of the image's diagonal, e.g. 0.0075")


def protocol_counts(
    probability: np.ndarray,
    truths: Sequence[np.ndarray],
    *,
    protocol: str,
    max_distance: float,
    suppressed: bool = False,
    valid: np.ndarray | None = None,
) -> np.ndarray:
    """Counts of a named protocol on one image.

    Args:
        probability: (H, W) in [0, 1], as the benchmark reads it: 8-bit maps divided by 255.
        truths: the annotators' maps, (H, W) bool each, lines one pixel wide.
        protocol: a key of `PROTOCOLS`.
        max_distance: as for `counts`.
        suppressed: the map went through non-maximum suppression already.
        valid: (H, W) bool, where predicted pixels count; everywhere by default.

    Returns (4, thresholds) int64: cntR, sumR, cntP, sumP, see `counts`. Raises ValueError as `counts` does.
    """
    rule = PROTOCOLS[protocol]
    edges, levels = np.asarray(probability, dtype=np.float64), np.array(rule.thresholds)
    _check_counts(edges, list(truths), levels, max_distance)
    if not suppressed:
        from pamm.tasks.metrics.correspondence import suppress

        edges = suppress(edges, rule.radius, rule.smoothing)
        edges = np.rint(edges * 255) / 255 if rule.stored else edges
    if valid is not None:
        edges = edges * valid
    levels = np.nextafter(levels, 2) if rule.strict else levels
    return np.array(counts(edges, truths, thresholds=levels, max_distance=max_distance))


def image_sums(probability: np.ndarray, label: np.ndarray, protocol: str, max_distance: float, outline: bool) -> dict:
    """One image's share of the scores: counts at every threshold, and those at the image's own best threshold.

    probability: (H, W) uint8, as the benchmarks store it. label: (H, W) uint8, 255 around and inside the image where
    nothing is to be counted. outline: the truth is the outline of the label's regions (see `Boundary`).
    """
    from pamm.tasks.metrics.correspondence import label_boundaries, thin

    rows, columns = (np.flatnonzero((label != Boundary.ignore).any(axis)) for axis in (1, 0))
    if not len(rows):
        return {name: value.numpy() for name, value in _empty(PROTOCOLS[protocol]).items()}
    frame = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    label = label[frame]
    truth = thin(label_boundaries(label == 1) if outline else label == 1)
    found = protocol_counts(
        probability[frame] / 255,
        [truth],
        protocol=protocol,
        max_distance=max_distance,
        valid=label != Boundary.ignore,
    )
    return {"counts": found, "best": found[:, int(f_measure(found).argmax())]}


def f_measure(found: np.ndarray) -> np.ndarray:
    """(4, ...) counts → F = 2PR / (P + R), 0 where undefined."""
    recall, precision = (found[i] / np.maximum(found[i + 1], 1) for i in (0, 2))
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def average_precision(found: np.ndarray) -> float:
    """(4, thresholds) counts → mean of the precision at recall 0, 0.01, …, 1, linear between thresholds, 0 beyond them."""
    recall, precision = (found[i] / np.maximum(found[i + 1], 1) for i in (0, 2))
    at, first = np.unique(recall, return_index=True)
    return float(np.interp(np.linspace(0, 1, 101), at, precision[first], left=0, right=0).sum() / 100)


def _empty(rule: BoundaryProtocol) -> dict[str, Tensor]:
    return {
        "counts": torch.zeros(4, len(rule.thresholds), dtype=torch.int64),
        "best": torch.zeros(4, dtype=torch.int64),
    }


@register
class Boundary(Task):
    """Whether an object's boundary runs through a pixel. Label 1 or 0, 255 ignored; prediction (H, W) probability.

    `positive_weight` w in (0, 1): the loss is −[w·y·log σ(x) + (1 − w)·(1 − y)·log(1 − σ(x))].
    `protocol`: name of a boundary benchmark, see `PROTOCOLS`. `max_distance`: how far a predicted pixel may lie from the
    true one, as a fraction of the image's diagonal. `outline`: the benchmark takes the outline of the regions that the
    label's values form (as on NYUD-v2), not the label itself. `soft`: label files are maps of probabilities, of which more
    than half is a boundary.
    """

    name = "edge"
    score = "odsF"
    quick_score = "maxF_pixel"
    units: ClassVar = {"odsF": "%", "oisF": "%", "AP": "%", "maxF_pixel": "%"}
    meaning = "probability that an object's boundary runs through a pixel, 0 to 1"
    colours = "probability of a boundary, white 0 to black 1"
    higher_is_better = True
    pixelwise = False
    ignore = 255
    channels = 1

    def __init__(
        self,
        *,
        positive_weight: float = 0.95,
        weight: float = 1.0,
        protocol: str = "bdet",
        max_distance: float = 0.0075,
        outline: bool = False,
        soft: bool = False,
    ):
        super().__init__(weight=weight)
        if not 0 < positive_weight < 1:
            raise ValueError(f"task 'edge': positive_weight is {positive_weight}, expected a number between 0 and 1")
        if protocol not in PROTOCOLS:
            raise ValueError(f"task 'edge': unknown protocol '{protocol}'; known protocols: {', '.join(PROTOCOLS)}")
        if not 0 <= max_distance < 1:
            raise ValueError(
                f"task 'edge': max_distance is {max_distance}, expected a fraction of the image's diagonal"
            )
        self.positive_weight = float(positive_weight)
        self.protocol, self.max_distance, self.outline = protocol, float(max_distance), bool(outline)
        self.soft = bool(soft)

    def options(self) -> dict[str, Any]:
        return {
            "positive_weight": self.positive_weight,
            "weight": self.weight,
            "protocol": self.protocol,
            "max_distance": self.max_distance,
            "outline": self.outline,
        } | ({"soft": True} if self.soft else {})

    def read(self, path: Path) -> Tensor:
        """Grey PNG of 0 and 255 → (1, H, W) uint8, 1 where it is 255, see `read_mask`. Raises LabelError."""
        return torch.from_numpy(read_mask(path, soft=self.soft))[None]

    def class_pixels(self, label: Tensor) -> dict[str, int]:
        return mask_pixels(label)

    def remarks(self, found: LabelStatistics) -> list[str]:
        """Also where most pixels are boundaries: the lines are stored dark on light, or regions in place of lines."""
        share = found.classes.get("yes", 0) / max(sum(found.classes.values()), 1)
        if share > MOST_LINES:
            return [
                f"{percent(share)} of the pixels of its labels are boundaries, expected thin lines of 255 on 0. Where lines are 0 "
                "on 255, write 255 minus the values; of masks or maps of labels, write the outlines"
            ]
        return super().remarks(found)

    def loss(self, logits: Tensor, label: Tensor, counts: Tensor | None = None) -> Tensor:
        logits, positive = full_precision(logits), label == 1
        weight = torch.where(positive, self.positive_weight, 1 - self.positive_weight) * (label != self.ignore)
        total = -(weight * F.logsigmoid(torch.where(positive, logits, -logits))).sum()
        return mean_over(total, self.counts(label) if counts is None else counts)

    def metric(self) -> Metric:
        """odsF: best F of the boundary benchmark at one threshold for the whole set; oisF: at each image's own; AP. Percent.

        Takes from a tenth of a second to a few per image, on all cores.
        """
        work = partial(image_sums, protocol=self.protocol, max_distance=self.max_distance, outline=self.outline)
        return image_metric(self.name, self._prepare, work, self._scores, _empty(PROTOCOLS[self.protocol]))

    def _prepare(self, logits: Tensor, label: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """One image: its map in 8 bits, as the benchmarks read it, and its label."""
        probability = (full_precision(logits)[0].sigmoid() * 255).to(torch.uint8)
        return probability.cpu().numpy(), label[0].to(torch.uint8).cpu().numpy()

    def _scores(self, sums: Sums) -> Sums:
        found, best = (sums[name].cpu().numpy() for name in ("counts", "best"))
        if not found[1].any():
            scores = {"odsF": np.nan, "oisF": np.nan, "AP": np.nan}
        else:
            scores = {"odsF": f_measure(found).max(), "oisF": f_measure(best), "AP": average_precision(found)}
        return {name: torch.tensor(100 * float(value), dtype=torch.float64) for name, value in scores.items()}

    def quick_metric(self) -> Metric:
        """maxF_pixel: largest F1 over 99 thresholds for the whole set, percent.

        A predicted pixel is right only where the label marks that very pixel, without the tolerance, thinning and
        matching of the benchmark's odsF: it is far lower than odsF and not comparable with it.
        """
        empty = {"bins": torch.zeros(2, len(THRESHOLDS) + 1, dtype=torch.int64)}
        return sum_metric(self.name, self._measure_pixels, self._pixel_scores, empty)

    def _measure_pixels(self, logits: Tensor, label: Tensor) -> Sums:
        probability, valid = full_precision(logits).sigmoid(), label != self.ignore
        return {"bins": threshold_counts(probability, label == 1, valid, THRESHOLDS)}

    def _pixel_scores(self, sums: Sums) -> Sums:
        return {"maxF_pixel": best_f_measure(sums["bins"], 1.0)}

    def score_image(self, logits: Tensor, label: Tensor) -> float:
        """As every task's; NaN without any pixel of a boundary, where F is 0 whatever is predicted."""
        return super().score_image(logits, label) if (label == 1).any() else math.nan

    def decode(self, logits: Tensor) -> Tensor:
        return full_precision(logits)[:, 0].sigmoid()

    def truth(self, label: Tensor) -> Tensor:
        return (label[0] == 1).float()

    def draw(
        self, prediction: np.ndarray, *, valid: np.ndarray | None = None, reference: np.ndarray | None = None
    ) -> np.ndarray:
        """Boundaries dark on white."""
        return grey_picture(1 - np.asarray(prediction, np.float32), valid)

    def label_file(self, prediction: np.ndarray) -> tuple[str, bytes]:
        """8-bit grey PNG, 255 times the probability, noted as such, so that it reads back as a mask (`read_mask`)."""
        return ".png", probability_png(prediction)
