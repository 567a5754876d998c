"""3×3 convolutions of maps in float32 by Winograd's minimal filtering, with gradients: a quarter of the multiplications."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pamm.nn.replace import taking_over
from pamm.ops.compiled import Kernel, left_to_torch, openmp

FEWEST_CHANNELS = 128
"""In and out, from which on the kernel pays."""

FEWEST_TILES = 16
"""Tiles of 4×4 positions in an image, from which on it pays to transform the kernels."""

LANES = 8
"""Numbers in a vector from which on the kernel pays: AVX2 and AVX-512."""


class _Convolution(ctypes.Structure):
    """`Convolution` of winograd.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "channels", "outputs")),
        *((name, ctypes.c_int64) for name in ("image", "row", "column", "turned")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y", "gradient", "transformed", "work")),
    )


def _declare(library: ctypes.CDLL) -> None:
    library.winograd_transformed.argtypes, library.winograd_transformed.restype = [ctypes.c_int64], ctypes.c_int64
    library.winograd_workspace.argtypes, library.winograd_workspace.restype = [], ctypes.c_int64
    library.winograd_run.argtypes, library.winograd_run.restype = (
        [ctypes.POINTER(_Convolution), ctypes.c_int, ctypes.c_void_p],
        None,
    )


KERNEL = Kernel(Path(__file__).with_suffix(".c"), _declare)


class KernelConv3x3(nn.Conv2d):
    """A 3×3 convolution that keeps the map's size, by `convolution_3x3`."""

    def forward(self, x: Tensor) -> Tensor:
        return convolution_3x3(x, self.weight, self.bias) if convolves_3x3(self) else super().forward(x)


def convolves_3x3(layer: nn.Conv2d) -> bool:
    """Whether a layer is what `KernelConv3x3` computes."""
    plain = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    return plain == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def replacement(module: nn.Module) -> nn.Module | None:
    """A 3×3 convolution of enough channels by the kernel, in the state of `module`; None for other modules."""
    if not isinstance(module, nn.Conv2d) or min(module.weight.shape[:2]) < FEWEST_CHANNELS:
        return None
    return taking_over(KernelConv3x3, module, nn.Conv2d) if convolves_3x3(module) else None


def convolution_3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C, h, w), (O, C, 3, 3), (O,) → (B, O, h, w), zeros around the map; as `torch.nn.functional.conv2d`."""
    if _suits(x, weight, bias) and _available():
        return torch.ops.pamm.convolution_3x3(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=1)


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        not left_to_torch()
        and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and x.dim() == 4
        and x.shape[1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and -(-x.shape[2] // 4) * -(-x.shape[3] // 4) >= FEWEST_TILES
    )


def objection() -> str | None:
    """Why torch's convolution runs on this machine, or None."""
    return KERNEL.unavailable(LANES)


@torch.compiler.assume_constant_result
def _available() -> bool:
    return objection() is None


@torch.library.custom_op("pamm::convolution_3x3", mutates_args=(), device_types="cpu")
def kernel_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, C, h, w), (O, C, 3, 3), (O,) → (B, O, h, w), channels-last, zeros around the map."""
    _check(x, weight.shape[1], [x, weight] if bias is None else [x, weight, bias])
    x, weight = _channels_last(x), weight.contiguous()
    y = _empty(x, weight, bias)
    problem = _problem(x, y)
    problem.weight = weight.data_ptr()
    problem.bias = None if bias is None else (bias := bias.contiguous()).data_ptr()
    _run(problem)
    return y


@kernel_convolution.register_fake
def _empty(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    images, _, height, width = x.shape
    return x.new_empty(images, height, width, len(weight)).permute(0, 3, 1, 2)


@torch.library.custom_op("pamm::convolution_3x3_input", mutates_args=(), device_types="cpu")
def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """Gradient of x from that of y, (B, O, h, w): the convolution with the kernels turned by 180° and their channels swapped."""
    _check(dy, len(weight), [dy, weight])
    dy, weight = _channels_last(dy), weight.contiguous()
    dx = _empty_input(dy, weight)
    problem = _problem(dy, dx)
    problem.turned, problem.weight = True, weight.data_ptr()
    _run(problem)
    return dx


@input_gradient.register_fake
def _empty_input(dy: Tensor, weight: Tensor) -> Tensor:
    images, _, height, width = dy.shape
    return dy.new_empty(images, height, width, weight.shape[1]).permute(0, 3, 1, 2)


@torch.library.custom_op("pamm::convolution_3x3_weight", mutates_args=(), device_types="cpu")
def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of the weights, (O, C, 3, 3), from that of y and the input."""
    _check(x, x.shape[1], [dy, x])
    if dy.shape[0] != x.shape[0] or dy.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"found gradients {tuple(dy.shape)} for maps {tuple(x.shape)}; expected the same images and positions"
        )
    dy, x = dy.contiguous(memory_format=torch.channels_last), _channels_last(x)
    gradient = dy.new_zeros(dy.shape[1], x.shape[1], 3, 3)
    problem = _problem(x, dy)
    problem.gradient = gradient.data_ptr()
    _run(problem)
    return gradient


@weight_gradient.register_fake
def _empty_weight(dy: Tensor, x: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1], x.shape[1], 3, 3)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients by the kernel, or by torch if they need gradients of their own."""
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad
    if torch.is_grad_enabled():
        pairs = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        wanted = [of_x, of_weight, of_bias]
        return torch.ops.aten.convolution_backward(dy, x, weight, [len(weight)], *pairs, wanted)
    return (
        torch.ops.pamm.convolution_3x3_input(dy, weight) if of_x else None,
        torch.ops.pamm.convolution_3x3_weight(dy, x) if of_weight else None,
        dy.sum((0, 2, 3)) if of_bias else None,
    )


kernel_convolution.register_autograd(_backward, setup_context=_keep)


def _check(x: Tensor, channels: int, tensors: list[Tensor]) -> None:
    """Raises ValueError for arguments that the kernel would read wrongly."""
    if x.shape[1] != channels or channels == 0 or any(tensor.dtype != torch.float32 for tensor in tensors):
        found = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors)
        raise ValueError(f"found {found}; expected maps of {max(channels, 1)} channels, all float32")


def _channels_last(tensor: Tensor) -> Tensor:
    """With the channels side by side; the other strides as they are."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous(memory_format=torch.channels_last)


def _problem(x: Tensor, y: Tensor) -> _Convolution:
    images, channels, height, width = x.shape
    problem = _Convolution(images, height, width, channels, y.shape[1], x.stride(0), x.stride(2), x.stride(3))
    problem.x, problem.y = x.data_ptr(), y.data_ptr()
    return problem


def _run(problem: _Convolution) -> None:
    library, threads = KERNEL.library(), torch.get_num_threads()
    problem.transformed = KERNEL.workspace("transformed", library.winograd_transformed(problem.channels))
    problem.work = KERNEL.workspace("work", threads * library.winograd_workspace())
    library.winograd_run(ctypes.byref(problem), threads, openmp())
