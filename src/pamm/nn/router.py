"""Noisy top-k routing from a channel map and a sum over positions, as in MLoRE and in PAMM's published code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pamm.runtime.distributed import joined_draw

NEVER = -1e10
"""Logit of an expert that is not chosen, before a softmax."""


def resize_positions(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) weights of a sum over positions → `size`, bilinear, in proportion to the area: the sum keeps its scale."""
    if weight.shape == size:
        return weight
    wide = weight.float()[None, None]  # torch has no antialiasing in 16 bits
    resized = F.interpolate(wide, size=size, mode="bilinear", align_corners=False, antialias=True)
    return (resized[0, 0] * (weight.numel() / resized.numel())).to(weight.dtype)


class SpatialRouter(nn.Module):
    """One task's expert weights p and mix m, from the mean over positions of a channel map and from a spatial sum.

    `renormalised`: the softmax is over the chosen experts, so that their weights sum to 1; else over all of them.
    """

    def __init__(self, channels: int, grid: tuple[int, int], experts: int, top_k: int, *, renormalised: bool = False):
        super().__init__()
        hidden = channels // 4
        self.top_k, self.renormalised = top_k, renormalised
        self.channel = nn.Sequential(nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.GELU())
        self.channel_out = nn.Linear(hidden, hidden)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(grid), std=0.02))
        self.positions_bias = nn.Parameter(torch.zeros(1))
        self.spatial = nn.Sequential(nn.LayerNorm(channels), nn.GELU(), nn.Linear(channels, hidden))
        self.scores = nn.Linear(2 * hidden, 2 * experts + 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, e, h, w) → p (B, E): softmax, all but the k largest zero; m (B, 1), any number.

        The last linear map of the channel path is applied to the pooled vector, which is the same and cheaper.
        """
        tokens = x.flatten(2).transpose(1, 2)
        channel = self.channel_out(self.channel(tokens).mean(1))
        positions = resize_positions(self.positions, (x.shape[-2], x.shape[-1])).flatten()
        spatial = self.spatial(positions.to(x.dtype) @ tokens + self.positions_bias.to(x.dtype))
        scores = self.scores(torch.cat([channel, spatial], dim=1)).float()
        experts = scores.shape[1] // 2
        logits, scale, mix = scores.split([experts, experts, 1], dim=1)
        if self.training:
            draw = joined_draw(lambda n: torch.randn(n, experts, device=scores.device), len(scores))
            logits = logits + draw * scale
        kept = torch.zeros_like(logits).scatter_(1, logits.topk(self.top_k, dim=1).indices, 1.0)
        if self.renormalised:
            return torch.where(kept > 0, logits, NEVER).softmax(1), mix
        return logits.softmax(1) * kept, mix
