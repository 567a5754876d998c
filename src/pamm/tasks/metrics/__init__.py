"""Metrics of whole data sets. Importing this package needs no extra; computing a metric needs torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from pamm.tasks.task import NonFiniteError

if TYPE_CHECKING:
    from torchmetrics import Metric

Sums = Mapping[str, Tensor]
"""Name → float64 or int64 tensor that adds up over images."""


def sum_metric(
    task: str, measure: Callable[[Tensor, Tensor], Sums], scores: Callable[[Sums], Sums], empty: Sums
) -> Metric:
    """Metric of a data set from sums over its images.

    task: name for the messages. measure: logits, label → the sums of one batch. scores: the sums of the data set →
    {name: 0-d tensor}. empty: the sums of no image, which give the states their shapes. `update` raises NonFiniteError for
    logits that are not finite. Raises ModuleNotFoundError without torchmetrics.
    """
    try:
        from pamm.tasks.metrics.sums import SumMetric
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"metrics need {error.name}; install it with: pip install 'pamm[train]'") from error
    return SumMetric(partial(_measure_finite, task, measure), scores, empty)


def _measure_finite(task: str, measure: Callable[[Tensor, Tensor], Sums], logits: Tensor, label: Tensor) -> Sums:
    """The sums of finite logits; comparisons with NaN would make some scores perfect."""
    finite = logits.isfinite()
    if not finite.all():
        raise NonFiniteError(
            f"the network's output for '{task}' is not finite: {int((~finite).sum())} of {logits.numel()} values are NaN or "
            "infinite. The training diverged or half precision overflowed: use an earlier checkpoint, a lower learning "
            "rate, or float32"
        )
    return measure(logits, label)
