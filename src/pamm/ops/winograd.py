"""3×3 convolutions of maps by Winograd's minimal filtering, for inference in float32: a quarter of the multiplications."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pamm.ops.compiled import Kernel, exporting, openmp

FEWEST_CHANNELS = 128
"""In and out, from which on the kernel pays."""

LANES = 8
"""Numbers in a vector from which on the kernel pays: AVX2 and AVX-512."""


class _Convolution(ctypes.Structure):
    """`Convolution` of winograd.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "channels", "outputs")),
        *((name, ctypes.c_int64) for name in ("image", "row", "column", "output_step", "tap_row", "tap_column")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y", "transformed", "work")),
    )


def _declare(library: ctypes.CDLL) -> None:
    library.winograd_transformed.argtypes, library.winograd_transformed.restype = [ctypes.c_int64], ctypes.c_int64
    library.winograd_workspace.argtypes, library.winograd_workspace.restype = [], ctypes.c_int64
    library.winograd_run.argtypes, library.winograd_run.restype = (
        [ctypes.POINTER(_Convolution), ctypes.c_int, ctypes.c_void_p],
        None,
    )


KERNEL = Kernel(Path(__file__).with_suffix(".c"), _declare)


class Convolution3x3(nn.Conv2d):
    """A 3×3 convolution that keeps the map's size, by `convolution_3x3`."""

    def forward(self, x: Tensor) -> Tensor:
        return convolution_3x3(x, self.weight, self.bias)


def convolves_3x3(layer: nn.Conv2d) -> bool:
    """Whether a layer is what `Convolution3x3` computes."""
    plain = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    return plain == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def convolution_3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C, h, w), (O, C, 3, 3), (O,) → (B, O, h, w), zeros around the map; as `torch.nn.functional.conv2d`."""
    if _suits(x, weight) and _available():
        return torch.ops.pamm.convolution_3x3(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=1)


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.dim() == 4
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and not exporting()
    )


@torch.compiler.assume_constant_result
def _available() -> bool:
    return KERNEL.unavailable() is None and KERNEL.library().vector_lanes() >= LANES


@torch.library.custom_op("pamm::convolution_3x3", mutates_args=(), device_types="cpu")
def kernel_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, C, h, w), (O, C, 3, 3), (O,) → (B, O, h, w), channels-last, zeros around the map."""
    x = x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)
    weight = weight if weight.stride(1) == 1 else weight.contiguous(memory_format=torch.channels_last)
    y = _empty(x, weight, bias)
    images, channels, height, width = x.shape
    strides = (x.stride(0), x.stride(2), x.stride(3), weight.stride(0), weight.stride(2), weight.stride(3))
    problem = _Convolution(images, height, width, channels, len(weight), *strides)
    problem.x, problem.weight, problem.y = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    problem.bias = None if bias is None else bias.contiguous().data_ptr()
    library, threads = KERNEL.library(), torch.get_num_threads()
    problem.transformed = KERNEL.workspace("transformed", library.winograd_transformed(channels))
    problem.work = KERNEL.workspace("work", threads * library.winograd_workspace())
    library.winograd_run(ctypes.byref(problem), threads, openmp())
    return y


@kernel_convolution.register_fake
def _empty(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    images, _, height, width = x.shape
    return x.new_empty(images, height, width, len(weight)).permute(0, 3, 1, 2)
