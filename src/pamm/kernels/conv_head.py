"""PAMM's head without its large input map, which has 16 positions for each of the feature's.

A 1×1 convolution commutes with an interpolation per channel. So the nine taps of the head's 3×3 convolution are applied as
1×1 convolutions on the small map, and each is interpolated to its shifted place: a sixteenth of the multiplications. Where the
C kernel (`pamm.kernels.head`) runs, the 3×3 convolution's output is never in memory either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pamm.kernels import head as kernel
from pamm.kernels.head import shifted_upsampling
from pamm.kernels.matrix import linear
from pamm.models.pamm import ConvHead
from pamm.nn.joined import JoinedBatchNorm2d
from pamm.nn.replace import taking_over
from pamm.runtime.distributed import world_size

TILE = 32
"""Side of the tiles of the large map. Without gradients, a CPU computes one tile after the other."""


class SmallMapHead(ConvHead):
    """`ConvHead` whose 3×3 convolution multiplies the small map."""

    def forward(self, feature: Tensor) -> Tensor:
        """(B, d, h, w) task feature → (B, channels, 4h, 4w) logits."""
        folds = isinstance(self.norm, JoinedBatchNorm2d) and self.norm.running_mean is not None
        inferring = folds and not (self.norm.training or torch.is_grad_enabled())
        trained_alone = folds and self.norm.training and world_size() == 1
        if (inferring or trained_alone) and self.suits_kernel(feature):
            return self.by_kernel(feature)
        if inferring and feature.device.type == "cpu":
            return self.by_tiles(feature)
        return self.by_torch(feature)

    def by_torch(self, feature: Tensor) -> Tensor:
        """As `forward`, with the large map of the 3×3 convolution's outputs in memory. Any device."""
        x = upsampled_conv3x3(feature, self.conv.weight, self.scale)
        if self.conv.bias is not None:
            x = x + self.conv.bias[:, None, None].to(x.dtype)
        return self.predict(F.gelu(self.norm(x)))

    def suits_kernel(self, feature: Tensor) -> bool:
        """Whether the kernel takes a feature and this head's parameters and statistics, all of them."""
        norm, bias = self.norm, [] if self.conv.bias is None else [self.conv.bias]
        others = norm.weight, norm.bias, norm.running_mean, norm.running_var, self.predict.bias, *bias
        return kernel.suits(feature, self.conv.weight, self.predict.weight, *others)

    def by_kernel(self, feature: Tensor) -> Tensor:
        """As `forward` with the batch's statistics, and with the running ones without a gradient: no large map in memory."""
        small = linear(feature.permute(0, 2, 3, 1).flatten(1, 2), kernel.taps(self.conv.weight))
        size = [*feature.shape[2:], self.scale]
        assert self.predict.bias is not None
        predict = self.predict.weight.flatten(1), self.predict.bias
        if not self.norm.training:
            return kernel.logits(small, *self.factor_and_shift(), *predict, size)
        weight, bias = self.norm.weight, self.norm.bias
        if self.conv.bias is not None:  # the normalisation takes it off again: its gradient is zero
            bias = bias + 0 * self.conv.bias
        logits, mean, variance = kernel.trained(small, weight, bias, *predict, self.norm.eps, size)
        if self.conv.bias is not None:
            mean = mean + self.conv.bias.detach()
        self.norm.track(mean, variance, small[..., 0].numel() * self.scale**2)
        return logits

    def factor_and_shift(self) -> tuple[Tensor, Tensor]:
        """(width,) each: with the running statistics GELU sees factor · (the convolution without its bias) + shift."""
        factor, shift = factor_and_shift(self.norm)
        return factor, shift if self.conv.bias is None else shift + factor * self.conv.bias

    def by_tiles(self, feature: Tensor) -> Tensor:
        """As `forward` with the running statistics, without a gradient: the BatchNorm in the taps, the large map tile by tile."""
        factor, shift = self.factor_and_shift()
        taps = self.conv.weight.permute(2, 3, 0, 1).clone(memory_format=torch.contiguous_format)
        small = tap_maps(feature, taps.mul_(factor[:, None]))
        batch, height, _, width, _, channels = small.shape
        small = small.reshape(batch, 3 * height, -1)
        shift, predict = shift.to(small.dtype), self.predict.weight.flatten(1)
        down, across = (bands(shifted_upsampling(length, self.scale).to(small)) for length in (height, width))
        rows = []
        for matrix, band in down:
            tall = (matrix @ small[:, band]).view(-1, 3 * width, channels)
            tiles = (torch.baddbmm(shift, m.expand(len(tall), -1, -1), tall[:, columns]) for m, columns in across)
            logits = [linear(F.gelu(tile), predict, self.predict.bias) for tile in tiles]
            rows.append(torch.cat(logits, dim=1).unflatten(0, (batch, -1)))
        return torch.cat(rows, dim=1).permute(0, 3, 1, 2)


def replacement(module: nn.Module) -> nn.Module | None:
    """The head without its large map, in the state of `module`; None for other modules."""
    return taking_over(SmallMapHead, module, ConvHead)


def factor_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """In eval mode a BatchNorm is factor · x + shift: (C,) each, float32, from its running statistics."""
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight.float() * torch.rsqrt(norm.running_var.float() + norm.eps)
    return factor, norm.bias.float() - norm.running_mean.float() * factor


def tap_maps(x: Tensor, taps: Tensor) -> Tensor:
    """Each of the nine taps of a 3×3 convolution applied as a 1×1 convolution.

    x (B, C, h, w), taps (3, 3, O, C) → (B, h, 3, w, 3, O): row, kernel row, column, kernel column, output channel.
    """
    rows = F.linear(x.permute(0, 2, 3, 1), taps.flatten(0, 2))
    return rows.unflatten(3, (3, 3, -1)).transpose(2, 3)


def upsampled_conv3x3(x: Tensor, weight: Tensor, scale: int) -> Tensor:
    """Conv3×3 (zero padding 1, no bias) of the bilinear ×scale upsampling of x, without making the large input map.

    One product for the nine taps on the small map, and one banded interpolation per axis.

    x (B, C, h, w), weight (O, C, 3, 3) → (B, O, h·scale, w·scale).
    """
    batch, channels, height, width = x.shape
    taps = weight.permute(2, 0, 3, 1).reshape(-1, channels)  # rows (ky, o, kx)
    small = F.conv2d(x, taps[:, :, None, None]).view(batch, 3, -1, 3, height, width)
    across, down = (
        shifted_upsampling(side, scale).to(small).transpose(1, 2).flatten(1) for side in (width, height)
    )  # columns (kx, w) and (ky, h)
    wide = small.transpose(3, 4).reshape(batch, 3, -1, height, 3 * width) @ across.T  # (B, 3, O, h, W)
    return down @ wide.transpose(1, 2).reshape(batch, -1, 3 * height, wide.shape[-1])


def bands(matrix: Tensor) -> list[tuple[Tensor, slice]]:
    """(length·scale, length, 3) → its blocks of TILE rows, each without the columns that are zero, and those columns.

    Columns are counted as in the last two axes side by side.
    """
    outputs, length, _ = matrix.shape
    scale, found = outputs // length, []
    for start in range(0, outputs, TILE):
        stop = min(start + TILE, outputs)
        first, last = max(0, (start - 1) // scale - 1), min(length, stop // scale + 2)
        found.append((matrix[start:stop, first:last].flatten(1), slice(3 * first, 3 * last)))
    return found
