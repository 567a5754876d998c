"""Metrics of whole data sets. Importing this package needs no extra; computing a metric needs torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import Metric

Sums = Mapping[str, Tensor]
"""Name → float64 or int64 tensor that adds up over images."""


def sum_metric(measure: Callable[[Tensor, Tensor], Sums], scores: Callable[[Sums], Sums], empty: Sums) -> Metric:
    """Metric of a data set from sums over its images.

    measure: logits, label → the sums of one batch. scores: the sums of the data set → {name: 0-d tensor}.
    empty: the sums of no image, which give the states their shapes. Raises ModuleNotFoundError without torchmetrics.
    """
    try:
        from pamm.tasks.metrics.sums import SumMetric
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"metrics need {error.name}; install it with: pip install 'pamm[train]'") from error
    return SumMetric(measure, scores, empty)
