"""Group normalisation of any number of values."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm without its refusal of a single value per group, which a map of one token has; it becomes the bias."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) → the same shape."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, torch.backends.cudnn.enabled)
