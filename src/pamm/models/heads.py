"""Prediction heads."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pamm.nn.joined import JoinedBatchNorm2d


@lru_cache(maxsize=64)
def shifted_upsampling(length: int, scale: int) -> np.ndarray:
    """(length·scale, 3·length) float32: the three matrices of bilinear upsampling followed by a shift of −1, 0, 1, side by side.

    Column block k holds the upsampled row X + k − 1 for every output row X; rows outside the large map are zero, as the
    zero padding of a 3×3 convolution on it.
    """
    identity = torch.eye(length)[None]
    up = F.interpolate(identity, scale_factor=scale, mode="linear", align_corners=False)[0].T.numpy()
    padded = np.pad(up, ((1, 1), (0, 0)))  # (length·scale + 2, length)
    return np.concatenate([padded[k : k + len(up)] for k in range(3)], axis=1)


def upsampled_conv3x3(x: Tensor, weight: Tensor, scale: int) -> Tensor:
    """Conv3×3 (zero padding 1, no bias) of the bilinear ×scale upsampling of x, without making the large input map.

    A 1×1 convolution commutes with an interpolation per channel, so the nine taps are applied on the small map and each is
    interpolated to its shifted place: one GEMM and one banded interpolation per axis.

    x (B, C, h, w), weight (O, C, 3, 3) → (B, O, h·scale, w·scale).
    """
    batch, channels, height, width = x.shape
    taps = weight.permute(2, 0, 3, 1).reshape(-1, channels)  # rows (ky, o, kx)
    small = F.conv2d(x, taps[:, :, None, None]).view(batch, 3, -1, 3, height, width)
    across = torch.from_numpy(shifted_upsampling(width, scale)).to(small)
    down = torch.from_numpy(shifted_upsampling(height, scale)).to(small)
    wide = small.transpose(3, 4).reshape(batch, 3, -1, height, 3 * width) @ across.T  # (B, 3, O, h, W)
    return down @ wide.transpose(1, 2).reshape(batch, -1, 3 * height, wide.shape[-1])


class ConvHead(nn.Module):
    """×4 bilinear upsampling, Conv3×3, BatchNorm, GELU, Conv1×1 (paper eq. 23).

    `bias` gives the Conv3×3 one, which the BatchNorm's makes superfluous but published weights hold.
    """

    def __init__(self, width: int, channels: int, *, scale: int = 4, bias: bool = False):
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.norm = JoinedBatchNorm2d(width)
        self.predict = nn.Conv2d(width, channels, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, d, h, w) task feature → (B, channels, 4h, 4w) logits."""
        x = upsampled_conv3x3(feature, self.conv.weight, self.scale)
        if self.conv.bias is not None:
            x = x + self.conv.bias[:, None, None].to(x.dtype)
        return self.predict(F.gelu(self.norm(x)))
