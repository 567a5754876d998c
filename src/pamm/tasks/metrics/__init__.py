"""Metrics of whole data sets. Importing this package needs no extra; computing a metric needs torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pamm.tasks.task import NonFiniteError

if TYPE_CHECKING:
    from torchmetrics import Metric

Sums = Mapping[str, Tensor]
"""Name → float64 or int64 tensor that adds up over images."""


def sum_metric(
    task: str, measure: Callable[[Tensor, Tensor], Sums], scores: Callable[[Sums], Sums], empty: Sums
) -> Metric:
    """Metric of a data set that is computed from sums over its images.

    Args:
        task: name of the task, for messages.
        measure: logits, label → the sums of one batch.
        scores: the sums of the data set → {name: 0-d tensor}.
        empty: the sums of no image; they set the shapes and dtypes of the states.

    Returns:
        A torchmetrics metric. `update` raises NonFiniteError for logits that are not finite.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed.
    """
    with _needing_extras():
        from pamm.tasks.metrics.sums import SumMetric
    return SumMetric(partial(_measure_finite, task, measure), scores, empty)


def image_metric(
    task: str,
    prepare: Callable[[Tensor, Tensor], tuple[np.ndarray, ...]],
    work: Callable[..., Mapping[str, np.ndarray]],
    scores: Callable[[Sums], Sums],
    empty: Sums,
) -> Metric:
    """As `sum_metric`, for sums that take long for each image: worker processes compute them.

    Args:
        task: name of the task, for messages.
        prepare: one image's logits (channels, H, W) and label (c, H, W) → arrays.
        work: these arrays → the image's sums, whole numbers. A module-level function.
        scores: the sums of the data set → {name: 0-d tensor}.
        empty: the sums of no image; they set the shapes and dtypes of the states.

    Returns:
        A torchmetrics metric. `update` raises NonFiniteError for logits that are not finite.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed.
    """
    with _needing_extras():
        from pamm.tasks.metrics.images import ImageMetric
    return ImageMetric(partial(_check_finite, task), prepare, work, scores, empty)


@contextmanager
def _needing_extras() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"metrics need {error.name}; install it with: pip install 'pamm[train]'") from error


def _measure_finite(task: str, measure: Callable[[Tensor, Tensor], Sums], logits: Tensor, label: Tensor) -> Sums:
    _check_finite(task, logits)
    return measure(logits, label)


def _check_finite(task: str, logits: Tensor) -> None:
    """Raise NonFiniteError; comparisons with NaN would make some scores perfect."""
    finite = logits.isfinite()
    if not finite.all():
        raise NonFiniteError(
            f"the network's output for '{task}' is not finite: {int((~finite).sum())} of {logits.numel()} values are NaN or "
            "infinite. The training diverged or half precision overflowed: use an earlier checkpoint, a lower learning "
            "rate, or float32"
        )
