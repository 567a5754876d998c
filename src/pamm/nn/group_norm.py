"""Group normalisation of any number of values."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm that also accepts a single value per group, as in a map of one token; the output is then the bias."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) → the same shape."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, torch.backends.cudnn.enabled)
