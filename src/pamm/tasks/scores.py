"""Small computations that the losses and metrics of several tasks share."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(logits: Tensor) -> Tensor:
    """Half precision → float32; float32 and float64 as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def mean_over(total: Tensor, counts: Tensor) -> Tensor:
    """Sum over valid pixels → total / max(counts[0], 1), in the sum's type."""
    return total / counts[0].clamp(min=1).to(total)


def threshold_counts(probability: Tensor, positive: Tensor, valid: Tensor, thresholds: Tensor) -> Tensor:
    """(2, T + 1) int64: negatives (row 0) and positives (row 1) by the number of thresholds they reach.

    probability float, positive and valid bool, all of one shape; thresholds (T,) ascending.
    """
    reached = torch.bucketize(probability[valid], thresholds.to(probability), right=True)
    bins = len(thresholds) + 1
    return torch.bincount(reached + bins * positive[valid], minlength=2 * bins).reshape(2, bins)


def best_f_measure(counts: Tensor, beta2: float) -> Tensor:
    """(2, T + 1) counts of `threshold_counts` → the largest F over the thresholds, percent, 0-d float64.

    F = (1 + β²)·P·R / (β²·P + R), 0 where it is undefined; NaN without any pixel.
    """
    at_least = counts.double().flip(-1).cumsum(-1).flip(-1)[:, 1:]
    hits, found, wanted = at_least[1], at_least.sum(0), counts[1].sum()
    precision, recall = hits / found, hits / wanted
    best = ((1 + beta2) * precision * recall / (beta2 * precision + recall)).nan_to_num(nan=0.0).max()
    return torch.where(counts.sum() > 0, 100 * best, torch.nan)
