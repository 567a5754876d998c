"""The sum over stages, weighted at every position by a softmax over them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pamm.nn.joined import JoinedBatchNorm2d


class StageFusion(nn.Sequential):
    """Conv1×1, BatchNorm, GELU, Conv3×3 on all stages side by side score them; their softmax weighs the sum.

    The fused maps of released PAMM and of MLoRE, one such module for every task.
    """

    def __init__(self, width: int, stages: int):
        super().__init__(
            nn.Conv2d(stages * width, width, 1),
            JoinedBatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, stages, 3, padding=1),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """One task's S maps (B, d, h, w) → (B, d, h, w)."""
        scores = super().forward(torch.cat(maps, dim=1))
        weights = scores.float().softmax(1).to(maps[0].dtype)
        total = maps[0] * weights[:, :1]
        for s in range(1, len(maps)):
            total = torch.addcmul(total, maps[s], weights[:, s : s + 1])
        return total
