"""Monocular depth estimation."""

from __future__ import annotations

import io
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from pamm.files import shown
from pamm.images import open_array
from pamm.tasks.metrics import Sums, sum_metric
from pamm.tasks.pictures import by_strips, check_readable, colour_map, paint, png_bytes, read_png
from pamm.tasks.scores import full_precision, mean_over
from pamm.tasks.task import LabelError, LabelStatistics, Task, percent, register

if TYPE_CHECKING:
    from torchmetrics import Metric

UNITS = {"metre": 1.0, "millimetre": 1000.0, "disparity": 256.0}
"""Name of a unit → the steps of a depth PNG in a metre, of disparity in a pixel."""

DISTANT = 100
"""Metres; where nothing is nearer, the unit is doubtful."""

NEARBY = 0.1
"""Metres; where nothing is farther, the unit is doubtful."""

FARTHEST = 1000
"""Metres, of disparity pixels; what is beyond is doubtful."""

COARSEST = 100
"""Steps per metre; with fewer, a prediction is not written as a PNG, which would round it."""

CLOSE = ("delta_1.25", "delta_1.25^2", "delta_1.25^3")
"""Metrics of the pixels whose ratio to the truth is close to 1."""

NEAREST = 1e-9
"""Metres; the metrics take a prediction of zero or less for this one."""


@register
class Depth(Task):
    """Distance of every pixel, metres, 0 where unknown; prediction (H, W) metres. Loss: mean absolute error.

    `unit`: of the values in a 16-bit depth PNG, "millimetre", "metre" or the steps of a metre as a number (256 in KITTI's
    files, 5000 in TUM's); or "disparity": all values are no distances but shifts between the two images of a stereo camera,
    pixels, which are larger where the scene is nearer, 256 steps of a PNG each. A `.npy` holds metres, or pixels.
    `maximum`: depths of this or more, e.g. 1e10 or 65.535 of a sky, are unknown, in the loss and in the metrics.
    `limit`: the metrics leave out pixels whose truth is this or more; the loss does not, as published for Cityscapes.
    """

    name = "depth"
    score = "RMSE"
    colours = "near yellow, far violet"
    higher_is_better = False
    ignore = 0
    suffixes = (".png", ".npy")
    label_dtype = torch.float32
    channels = 1

    def __init__(
        self,
        *,
        unit: str | float = "millimetre",
        maximum: float | None = None,
        limit: float | None = None,
        weight: float = 1.0,
    ):
        super().__init__(weight=weight)
        unit = _unit(unit)
        for name, value in (("maximum", maximum), ("limit", limit)):
            if value is not None and not (_is_number(value) and value > 0):
                raise ValueError(f"task 'depth': {name} is {value!r}, expected metres as a number above 0, e.g. 80")
        self.unit, self.maximum, self.limit = unit, maximum, limit
        self.steps = UNITS[unit] if isinstance(unit, str) else float(unit)
        """Of a PNG, in a metre (of disparity: in a pixel)."""
        is_disparity = unit == "disparity"
        self.meaning = (
            "disparity of a pixel, pixels, 0 or more" if is_disparity else "distance of a pixel, metres, 0 or more"
        )
        self.map_unit = "px" if is_disparity else "m"
        self.units = {"RMSE": self.map_unit, "sq_rel": self.map_unit} | dict.fromkeys(CLOSE, "%")

    def options(self) -> dict[str, Any]:
        bounds = {"maximum": self.maximum, "limit": self.limit}
        known = {name: value for name, value in bounds.items() if value is not None}
        return {"unit": self.unit, "weight": self.weight} | known

    def read(self, path: Path) -> Tensor:
        """16-bit grey PNG in `unit`, or `.npy` of floats in metres → (1, H, W) float32 metres. Raises LabelError.

        In a `.npy` every value that is not a positive finite number is unknown.
        """
        if Path(path).suffix.lower() == ".npy":
            return self.without_far(torch.from_numpy(read_array(Path(path)))[None])
        unit = f"one step a {self.unit}" if self.unit in UNITS else f"{self.unit:g} steps a metre"
        values = read_png(path, {"grey": (16,)}, f"a 16-bit grey PNG of depth, {unit}, 0 = unknown")
        return self.without_far(torch.from_numpy((values / self.steps).astype(np.float32))[None])

    def without_far(self, label: Tensor) -> Tensor:
        """Depths of `maximum` and more become unknown."""
        return label if self.maximum is None else torch.where(label < self.maximum, label, self.ignore)

    def statistics(self, label: Tensor) -> LabelStatistics:
        known = label[self.valid(label)]
        lowest, highest = (known.min().item(), known.max().item()) if known.numel() else (math.inf, -math.inf)
        return replace(super().statistics(label), lowest=lowest, highest=highest)

    def rescale(self, label: Tensor, factor: float) -> Tensor:
        """An image zoomed by `factor` shows the scene that much nearer."""
        return label * factor if self.unit == "disparity" else label / factor

    def loss(self, logits: Tensor, label: Tensor, counts: Tensor | None = None) -> Tensor:
        error = (full_precision(logits) - label).abs()
        total = torch.where(self.valid(label), error, 0).sum()
        return mean_over(total, self.counts(label) if counts is None else counts)

    def metric(self) -> Metric:
        """Errors over all pixels of the set: RMSE (metres), log_RMSE (natural logarithm), abs_rel, sq_rel (metres),
        and delta_1.25, delta_1.25^2, delta_1.25^3, percent of pixels whose ratio to the truth is below that bound.
        """
        empty = {
            name: torch.zeros((), dtype=torch.float64) for name in ("square", "log_square", "relative", "relative2")
        }
        counts = {"close": torch.zeros(3, dtype=torch.int64), "count": torch.zeros((), dtype=torch.int64)}
        return sum_metric(self.name, self._measure, self._scores, empty | counts)

    def _measure(self, logits: Tensor, label: Tensor) -> Sums:
        valid = self.valid(label)
        if self.limit is not None:
            valid &= label < self.limit
        truth, guess = label[valid].double(), logits[valid].double().clamp(min=NEAREST)
        error, ratio = guess - truth, torch.maximum(guess / truth, truth / guess)
        return {
            "square": error.square().sum(),
            "log_square": (guess.log() - truth.log()).square().sum(),
            "relative": (error.abs() / truth).sum(),
            "relative2": (error.square() / truth).sum(),
            "close": torch.stack([(ratio < 1.25**power).sum() for power in (1, 2, 3)]),
            "count": valid.sum(),
        }

    def _scores(self, sums: Sums) -> Sums:
        count = sums["count"].double()
        close = dict(zip(CLOSE, 100 * sums["close"] / count, strict=True))
        return {
            "RMSE": (sums["square"] / count).sqrt(),
            "log_RMSE": (sums["log_square"] / count).sqrt(),
            "abs_rel": sums["relative"] / count,
            "sq_rel": sums["relative2"] / count,
        } | close

    def decode(self, logits: Tensor) -> Tensor:
        return full_precision(logits)[:, 0].clamp(min=0)

    def truth(self, label: Tensor) -> Tensor:
        return label[0]

    def draw(
        self, prediction: np.ndarray, *, valid: np.ndarray | None = None, reference: np.ndarray | None = None
    ) -> np.ndarray:
        """Near yellow, far violet, between the nearest and farthest known depth of `reference` (default: this map)."""
        near, far = self.scale(prediction if reference is None else reference) or (0.0, 1.0)
        if self.unit == "disparity":
            return paint(colour_map((np.asarray(prediction, np.float64) - near) / max(far - near, 1e-6)), valid)
        return paint(colour_map((far - np.asarray(prediction, np.float64)) / max(far - near, 1e-6)), valid)

    def scale(self, values: np.ndarray) -> tuple[float, float] | None:
        """The nearest and farthest known depth (of disparities: the farthest and nearest)."""
        known = np.asarray(values)
        known = known[np.isfinite(known) & (known > 0)]
        return (float(known.min()), float(known.max())) if known.size else None

    def describe(self, found: LabelStatistics) -> str:
        if found.lowest > found.highest:
            return "every value unknown"
        unit = "pixels of disparity" if self.unit == "disparity" else "m"
        return f"{found.lowest:.4g} to {found.highest:.4g} {unit}; {percent(found.ignored_share)} of the pixels unknown"

    def remarks(self, found: LabelStatistics) -> list[str]:
        """Only of the range: a sky's value in place of a distance, another unit. Sparse labels are common."""
        if found.lowest > found.highest:
            return []
        is_disparity = self.unit == "disparity"
        what = "disparities" if is_disparity else "depths"
        spread = f"{what} are from {found.lowest:.4g} to {found.highest:.4g} {self.map_unit}"
        unit = (
            "the values look like another unit. A .npy holds metres (of millimetres: divide by 1000); a PNG has the unit that "
            "dataset.yaml states it, e.g. 'depth: {unit: millimetre}', 'depth: {unit: metre}' or 'depth: {unit: 256}'"
        )
        if found.lowest >= DISTANT and not is_disparity:
            return [f"{spread}, nothing nearer than {DISTANT} m: {unit}"]
        if found.highest <= NEARBY and not is_disparity:
            return [f"{spread}, nothing farther than {NEARBY} m: {unit}"]
        last = [step / self.steps for step in (65535, 65534)]  # Cityscapes stores disparity one step higher
        is_last_step = any(math.isclose(found.highest, value, rel_tol=1e-6) for value in last)
        if is_last_step or found.highest >= FARTHEST:
            bound = math.floor(100 * found.highest) / 100 if is_last_step else FARTHEST
            return [
                f"{spread}: the largest looks like a mark of the sky or of unknown pixels, or like another unit, not like a "
                f"measured value, and is trained on. In dataset.yaml, 'depth: {{maximum: {bound:g}}}' makes {what} of {bound:g} "
                f"{self.map_unit} and more unknown"
            ]
        return []

    def label_file(self, prediction: np.ndarray) -> tuple[str, bytes]:
        """16-bit PNG in `unit`, rounded to its steps; `.npy`, in which nothing is rounded or cut, where the unit is coarser
        than a centimetre or a depth is beyond the PNG's 65535 steps.
        """
        values = np.nan_to_num(np.asarray(prediction, np.float32), posinf=0)
        np.maximum(values, 0, out=values)
        if self.steps >= COARSEST and np.rint(float(values.max(initial=0)) * self.steps) <= 65535:
            return ".png", png_bytes(
                by_strips(lambda part: np.rint(part.astype(np.float64) * self.steps).astype(np.uint16), values)
            )
        buffer = io.BytesIO()
        np.save(buffer, values)
        return ".npy", buffer.getvalue()


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _unit(unit: str | float) -> str | float:
    """A known name, or a number of steps, which may be written as text. Raises ValueError for anything else."""
    if isinstance(unit, str) and unit in UNITS:
        return unit
    if isinstance(unit, str):
        with suppress(ValueError):
            unit = float(unit)
    if _is_number(unit) and unit >= 1:
        return int(unit) if unit == int(unit) else unit
    hint = f"; steps of {unit:g} m each are {1 / unit:g} a metre" if _is_number(unit) and 0 < unit < 1 else ""
    raise ValueError(
        f"task 'depth': unit is {unit!r}, expected 'millimetre', 'metre', the steps of a metre as a number (256 in KITTI's "
        f"PNG, 5000 in TUM's){hint}; or 'disparity', pixels of a stereo camera in 256 steps each, which are no distances"
    )


def read_array(path: Path, *, remedy: str = "write it again, or leave the image without this label") -> np.ndarray:
    """`.npy` of float metres, (H, W) or (H, W, 1) → (H, W) float32, 0 where unknown. Raises LabelError, which ends in `remedy`."""
    expected = "expected a .npy array of float metres, (H, W)"
    check_readable(path, f"{expected}; {remedy}")
    try:
        values = open_array(path)
    except (OSError, ValueError) as error:
        raise LabelError(
            f"{shown(path, 200)} is not a whole .npy file of numbers ({shown(error, 200)}), {expected}; {remedy}"
        ) from None
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 2 or values.dtype.kind != "f" or 0 in values.shape:
        raise LabelError(f"{path} holds {values.dtype} of shape {values.shape}, {expected}; {remedy}")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    return np.where(np.isfinite(values) & (values > 0), values, np.float32(0))
