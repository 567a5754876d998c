"""The released PAMM's experts without gradients: one convolution whose 9×9 kernel is made for one image, by its experts' weights.

Summed kernels are as large as the base, and a direct convolution multiplies each of their 81 taps at every position. The
C kernel sums the kernels block by block in the cache and takes them and the image through Fourier transforms of squares, which
leave 8 multiplications per position.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pamm.kernels.conv_head import factor_and_shift
from pamm.models.pamm_released import ReleasedExperts
from pamm.nn.replace import taking_over
from pamm.ops.compiled import Kernel, left_to_torch, openmp

TAPS = 9
SLICES = 16
"""Jobs: slices of the input channels, each with sums of its own; fixed, so that results do not depend on the threads."""


class _Mixed(ctypes.Structure):
    """`Mixed` of mixed_convolution.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("height", "width", "channels", "outputs", "parts", "slices", "half")),
        *((name, ctypes.c_int64) for name in ("row", "column")),
        *((name, ctypes.c_void_p) for name in ("x", "weights", "base", "part", "sums", "y", "work")),
    )


def _declare(library: ctypes.CDLL) -> None:
    problem = ctypes.POINTER(_Mixed)
    for name in ("mixed_workspace", "mixed_sums"):
        function = getattr(library, name)
        function.argtypes, function.restype = [problem], ctypes.c_int64
    library.mixed_run.argtypes, library.mixed_run.restype = [problem, ctypes.c_int, ctypes.c_void_p], None


KERNEL = Kernel(Path(__file__).with_suffix(".c"), _declare)


class FoldedExperts(ReleasedExperts):
    """`ReleasedExperts` that folds everything behind the routing into one convolution per image, in eval mode.

    There it is affine in x. Not with gradients: one would pass the general path, which sends none back.
    """

    def one_task(self, task: str, weights: Tensor, mix: Tensor, x: Tensor) -> Tensor:
        """Routing (B, E) and (B, 1), map (B, e, h, w) → (B, N, h, w), without the prior."""
        if self.training or torch.is_grad_enabled():
            return super().one_task(task, weights, mix, x.contiguous())  # channels-last takes twice the time here
        parts, maps = [self.reduce.flatten(0, 1), self.task_reduce[task].weight], []
        for p, m, image in zip(weights, mix, x.permute(0, 2, 3, 1), strict=True):
            with torch.autocast(x.device.type, enabled=False):
                mixture, factor, shift = self.fold(task, p.float(), m.float())
                convolved = mixed_convolution(image, self.general.weight, parts, mixture)
            maps.append(torch.addcmul(shift, convolved, factor))
        return torch.stack(maps).permute(0, 3, 1, 2)

    def fold(self, task: str, p: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p (E,), m (1,) → weights (N, E·rank + rank) of the reducing convolutions, factor (N,) and shift (N,), all float32.

        The map of that task and image is factor · (general + weighted reducing kernels) * x + shift.
        """
        inner, inner_shift = factor_and_shift(self.norm_experts[task])
        factor, shift = factor_and_shift(self.norm[task])
        own, own_restore = self.task_reduce[task], self.task_restore[task]
        shared = (inner[:, None] * (self.restore * p[:, None, None]).transpose(0, 1).flatten(1)).float()
        assert own.bias is not None and own_restore.bias is not None and self.general.bias is not None
        private = m * own_restore.weight.flatten(1).float()
        bias = shared @ self.reduce_bias.flatten().float() + inner * (p @ self.restore_bias.float()) + inner_shift
        bias = bias + private @ own.bias.float() + m * own_restore.bias.float() + self.general.bias.float()
        return torch.cat([shared, private], dim=1), factor, factor * bias + shift


def replacement(module: nn.Module) -> nn.Module | None:
    """The released experts folded, in the state of `module`; None for other modules."""
    return taking_over(FoldedExperts, module, ReleasedExperts)


def mixed_convolution(x: Tensor, base: Tensor, parts: list[Tensor], weights: Tensor) -> Tensor:
    """One image by the kernel base + Σ_j weights[:, j] · parts[j], for inference.

    x: (h, w, C). base: (N, C, k, k), k odd. parts: tensors (J_i, C, k, k), which stand one after another. weights: (N, ΣJ).
    Returns (h, w, N) in float32. Zeros surround the image.
    """
    if _suits(x, base, parts, weights):
        return torch.ops.pamm.mixed_convolution(x, base, parts, weights)
    return in_torch(x, base, parts, weights)


def _suits(x: Tensor, base: Tensor, parts: list[Tensor], weights: Tensor) -> bool:
    return (
        not left_to_torch()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and all(kernel.shape[1:] == (x.shape[2], TAPS, TAPS) for kernel in (base, *parts))
        and weights.shape == (len(base), sum(map(len, parts)))
        and x.numel() > 0
        and _available()
    )


@torch.compiler.assume_constant_result
def _available() -> bool:
    return KERNEL.unavailable() is None


def in_torch(x: Tensor, base: Tensor, parts: list[Tensor], weights: Tensor) -> Tensor:
    kernel = base.flatten(1).float()
    for part, own in zip(parts, weights.float().split([len(part) for part in parts], dim=1), strict=True):
        kernel = torch.addmm(kernel, own, part.flatten(1).float())
    image = x.permute(2, 0, 1)[None].contiguous()  # channels-last takes twice the time with such large kernels
    maps = F.conv2d(image, kernel.view_as(base).to(x.dtype), padding=base.shape[-1] // 2)
    return maps[0].permute(1, 2, 0).float()


@torch.library.custom_op("pamm::mixed_convolution", mutates_args=(), device_types="cpu")
def kernel_convolution(x: Tensor, base: Tensor, parts: list[Tensor], weights: Tensor) -> Tensor:
    """`mixed_convolution` by the C kernel. Parts without a weight, those of experts not chosen, are not read."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    base, parts = base.float().contiguous(), [part.float().contiguous() for part in parts]
    places = [part.data_ptr() + 4 * index * part[0].numel() for part in parts for index in range(len(part))]
    chosen = weights.any(0).nonzero()[:, 0].tolist()
    library, lanes = KERNEL.library(), KERNEL.library().vector_lanes()
    outputs = len(weights)
    in_lanes = F.pad(weights.float()[:, chosen], (0, 0, 0, -outputs % lanes)).unflatten(0, (-1, lanes))
    in_lanes = in_lanes.transpose(1, 2).contiguous()
    part = (ctypes.c_void_p * max(1, len(chosen)))(*(places[index] for index in chosen))
    y = _empty(x, base)
    height, width, channels = x.shape
    half = x.dtype == torch.bfloat16
    slices = min(SLICES, -(-channels // 16))
    problem = _Mixed(height, width, channels, outputs, len(chosen), slices, half, *x.stride()[:2])
    problem.x, problem.weights, problem.base, problem.y = (t.data_ptr() for t in (x, in_lanes, base, y))
    problem.part = ctypes.addressof(part)
    threads = torch.get_num_threads()
    problem.sums = KERNEL.workspace("sums", library.mixed_sums(ctypes.byref(problem)))
    problem.work = KERNEL.workspace("work", threads * library.mixed_workspace(ctypes.byref(problem)))
    library.mixed_run(ctypes.byref(problem), threads, openmp())
    return y


@kernel_convolution.register_fake
def _empty(x: Tensor, base: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:2], len(base), dtype=torch.float32)
