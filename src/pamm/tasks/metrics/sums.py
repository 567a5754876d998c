"""A torchmetrics metric whose states are sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from pamm.tasks.metrics import Sums


class SumMetric(Metric):
    """States are sums over images, reduced by sum over processes: any split of the images gives the same number.

    Arguments as in `sum_metric`. `update` moves its inputs to the metric's device. A metric that saw no valid pixel
    computes NaN, without torchmetrics's warning: a process whose share of the images is empty is no mistake.
    """

    full_state_update = False

    def __init__(self, measure: Callable[[Tensor, Tensor], Any], scores: Callable[[Sums], Sums], empty: Sums):
        super().__init__()
        self.measure = measure
        self.scores = scores
        self.names = tuple(empty)
        for name, value in empty.items():
            self.add_state(name, value, dist_reduce_fx="sum")

    @property
    def update_called(self) -> bool:
        """True: the sums of no image are valid sums."""
        return True

    @torch.no_grad()
    def update(self, logits: Tensor, label: Tensor) -> None:
        """(B, channels, H, W) logits of any float type and (B, c, H, W) label; neither is changed."""
        for name, value in self.measure(logits.to(self.device), label.to(self.device)).items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, Tensor]:
        """Name → 0-d float64 tensor."""
        return dict(self.scores({name: getattr(self, name) for name in self.names}))
