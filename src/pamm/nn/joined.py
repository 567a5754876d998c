"""Layers that treat the batches of all processes as one joined batch.

Two processes with half a batch each then compute what one process computes on the whole: the statistics of batch
normalisation and the random draws (router noise, stochastic depth) are those of the joined batch. Process r holds the r-th
contiguous part of it, and all processes hold equal parts.
"""

from __future__ import annotations

import torch
import torch.distributed.nn.functional as dist_functional
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from pamm import PammError
from pamm.nn.checkpointing import computing_again
from pamm.nn.replace import replace_modules, taking_over
from pamm.runtime.distributed import joined_draw, world_size


class JoinedDropPath(DropPath):
    """Stochastic depth per sample (as timm's), drawn for the joined batch."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) → (B, ...), in training with whole samples set to zero and the rest scaled up."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = joined_draw(lambda n: torch.rand(n, device=x.device) < keep, x.shape[0]).to(x.dtype) / keep
        return x * mask.view(-1, *[1] * (x.ndim - 1))


def join_drop_paths(module: nn.Module) -> None:
    """Replace every timm DropPath inside `module` by a JoinedDropPath of the same rate."""
    replace_modules(module, lambda part: taking_over(JoinedDropPath, part, DropPath))


class _ContiguousGradient(torch.autograd.Function):
    """The identity, with a contiguous gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class BatchError(PammError, ValueError):
    """A batch that cannot be normalised; the message gives its size and the remedy."""


class JoinedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over (B, H, W) of the joined batch, on any device (torch's SyncBatchNorm refuses a CPU)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W); computed in float32 whatever the autocast."""
        if self.training and x[:, 0].numel() * world_size() == 1:
            raise BatchError(
                "a batch of one image whose feature map is one pixel: training normalises each channel by the batch's mean and "
                "variance, which needs two values or more. Give larger images (data.size) or more of them (train.batch)"
            )
        again = self.training and not torch.compiler.is_compiling() and computing_again()
        if not self.training or world_size() == 1:
            # torch (2.15, CPU) mistakes the layout of a single image's gradient whose channels come last: wrong numbers.
            x = x.contiguous()
            if again:
                assert self.running_mean is not None and self.running_var is not None
                untouched = self.running_mean.clone(), self.running_var.clone()
                y = F.batch_norm(x, *untouched, self.weight, self.bias, training=True, eps=self.eps)
            else:
                y = super().forward(x)
            return _ContiguousGradient.apply(y) if torch.is_grad_enabled() else y
        wide = x.float()
        count = wide.numel() // wide.shape[1] * world_size()
        mean = dist_functional.all_reduce(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = dist_functional.all_reduce(centred.square().sum((0, 2, 3))) / count
        self.track(mean, variance, count)
        y = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        return torch.addcmul(self.bias[:, None, None], y, self.weight[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Let the running statistics follow those of `count` values per channel, (C,) each; not when they are computed again.

        By `momentum`, or where that is None to the average over all batches so far, as in `torch.nn.BatchNorm2d`.
        """
        if not torch.compiler.is_compiling() and computing_again():
            return
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = (1 / self.num_batches_tracked).to(mean) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), share)
