"""A prediction head behind the taps of its 3×3 convolution, in C on a CPU: its large map is never in memory.

The head interpolates a map, convolves it 3×3, normalises it over batch and positions, and predicts from its GELU with a 1×1
convolution. The nine taps are products on the small map (`taps`); a row of the large map, which is a sum of a few of their rows,
is made again wherever it is needed: for the statistics, for the logits and for the gradients.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pamm.ops.compiled import Kernel, left_to_torch, openmp

GROUP = 16
"""Channels that lie side by side in the taps' products."""

TERMS = 6
"""Small positions and taps that a large position is the sum of, along one axis."""

PASSES = ("statistics", "logits", "sums", "products")
"""Results of `head_run`, in the order of its enumeration."""


class _Head(ctypes.Structure):
    """`Head` of head.c."""

    _sizes = ("images", "height", "width", "tall", "wide", "channels", "outputs", "spread")
    _tables = ("row_from", "column_from", "column_to", "row_share", "column_share", "column_given")
    _arrays = (
        *("small", "factor", "shift", "predict", "bias", "logits", "mean", "squares", "dlogits"),
        *("centre", "scale", "slope", "drift", "dshift", "dfactor", "dpredict", "dsmall", "work"),
    )
    _fields_ = (
        *((name, ctypes.c_int64) for name in _sizes),
        *((name, ctypes.c_void_p) for name in (*_tables, *_arrays)),
    )


def _declare(library: ctypes.CDLL) -> None:
    library.head_workspace.argtypes, library.head_workspace.restype = [ctypes.POINTER(_Head)], ctypes.c_int64
    library.head_run.argtypes, library.head_run.restype = (
        [ctypes.POINTER(_Head), ctypes.c_int, ctypes.c_int, ctypes.c_void_p],
        None,
    )


KERNEL = Kernel(Path(__file__).with_suffix(".c"), _declare)


def shifted_upsampling(length: int, scale: int) -> Tensor:
    """(length·scale, length, 3), float64: the matrices of bilinear upsampling followed by a shift of −1, 0, 1.

    [:, :, k] takes output row X from the upsampled row X + k − 1; rows outside the large map are zero, as the zero padding
    of a 3×3 convolution on it.
    """
    eye = torch.eye(length, dtype=torch.float64, device="cpu")[None]
    up = F.interpolate(eye, scale_factor=scale, mode="linear", align_corners=False)[0].T
    padded = F.pad(up, (0, 0, 1, 1))  # (length·scale + 2, length)
    return torch.stack([padded[k : k + length * scale] for k in range(3)], dim=2)


def suits(x: Tensor, weight: Tensor, predict: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernel takes a map (B, C, h, w), a 3×3 convolution's weight (O, C, 3, 3) and a 1×1 convolution's (o, O, 1, 1).

    others: whatever else the head consists of; the kernel takes no head where one is None.
    """
    return (
        not left_to_torch()
        and not torch.is_autocast_enabled("cpu")
        and all(
            t is not None and t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, weight, predict, *others)
        )
        and x.dim() == 4
        and weight.shape[0] % GROUP == 0
        and weight.shape[1:] == (x.shape[1], 3, 3)
        and predict.shape[1:] == (weight.shape[0], 1, 1)
        and x.numel() > 0
        and _available()
    )


@torch.compiler.assume_constant_result
def _available() -> bool:
    return KERNEL.unavailable() is None


def taps(weight: Tensor) -> Tensor:
    """A 3×3 convolution's weight (O, C, 3, 3) → (9·O, C), by which every position of the small map is multiplied.

    Its rows are (O / GROUP, kernel row, kernel column, GROUP).
    """
    channels = weight.shape[1]
    return weight.unflatten(0, (-1, GROUP)).permute(0, 3, 4, 1, 2).reshape(-1, channels)


def trained(
    small: Tensor, weight: Tensor, bias: Tensor, predict: Tensor, predict_bias: Tensor, eps: float, size: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """In training: normalised by the batch's own statistics.

    Args:
        small: (B, h·w, 9·O), the products of the small map with `taps`.
        weight, bias: (O,), of the normalisation.
        predict, predict_bias: (o, O) and (o,), the 1×1 convolution.
        eps: added to the variance.
        size: h, w and the scale s.

    Returns:
        logits (B, o, s·h, s·w), and mean and (biased) variance of the large map, (O,), which carry no gradient.
    """
    return torch.ops.pamm.head(small, weight, bias, predict, predict_bias, eps, size)


def logits(small: Tensor, factor: Tensor, shift: Tensor, predict: Tensor, bias: Tensor, size: list[int]) -> Tensor:
    """For inference, (B, o, s·h, s·w): GELU sees factor · map + shift, (O,) each. The other arguments as in `trained`."""
    return torch.ops.pamm.head_logits(small, factor, shift, predict, bias, size)


@torch.library.custom_op("pamm::head_logits", mutates_args=(), device_types="cpu")
def head_logits(small: Tensor, factor: Tensor, shift: Tensor, predict: Tensor, bias: Tensor, size: list[int]) -> Tensor:
    """`logits` as one node of a graph."""
    y = _empty_logits(small, factor, shift, predict, bias, size)
    given = {"factor": factor, "shift": shift, "predict": predict, "bias": bias}
    _run("logits", small, size, len(predict), {**given, "logits": y})
    return y


@head_logits.register_fake
def _empty_logits(small: Tensor, _: Tensor, __: Tensor, predict: Tensor, ___: Tensor, size: list[int]) -> Tensor:
    height, width, scale = size
    return small.new_empty(len(small), len(predict), height * scale, width * scale)


@torch.library.custom_op("pamm::head", mutates_args=(), device_types="cpu")
def kernel_head(
    small: Tensor, weight: Tensor, bias: Tensor, predict: Tensor, predict_bias: Tensor, eps: float, size: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`trained` as one node of a graph."""
    means, squares = (small.new_empty((len(small), len(weight)), dtype=torch.float64) for _ in range(2))
    _run("statistics", small, size, len(predict), {"mean": means, "squares": squares})
    mean = means.mean(0)
    positions = size[0] * size[1] * size[2] ** 2
    variance = squares.sum(0) / (positions * len(small)) + (means - mean).square().mean(0)
    mean, variance = mean.float(), variance.float()
    factor = weight * torch.rsqrt(variance + eps)
    return head_logits(small, factor, bias - mean * factor, predict, predict_bias, size), mean, variance


@kernel_head.register_fake
def _(small: Tensor, weight: Tensor, bias: Tensor, predict: Tensor, predict_bias: Tensor, _: float, size: list[int]):
    y = _empty_logits(small, weight, bias, predict, predict_bias, size)
    return y, torch.empty_like(weight), torch.empty_like(weight)


@torch.library.custom_op("pamm::head_backward", mutates_args=(), device_types="cpu")
def head_backward(
    dlogits: Tensor,
    small: Tensor,
    weight: Tensor,
    bias: Tensor,
    predict: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    size: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of small, weight, bias and predict."""
    images, count = len(small), len(small) * size[0] * size[1] * size[2] ** 2
    scale = torch.rsqrt(variance + eps)
    factor = weight * scale
    given = {"dlogits": dlogits.permute(0, 2, 3, 1), "predict": predict, "centre": mean, "scale": scale}
    given |= {"factor": factor, "shift": bias - mean * factor}
    sums = {"dshift": small.new_empty(images, len(weight)), "dfactor": small.new_empty(images, len(weight))}
    sums["dpredict"] = small.new_empty(images, *predict.shape)
    _run("sums", small, size, len(predict), {**given, **sums})
    dweight, dbias = sums["dfactor"].sum(0), sums["dshift"].sum(0)
    dsmall = small.new_empty(small.shape)
    averages = {"slope": dweight / count, "drift": dbias / count}
    _run("products", small, size, len(predict), {**given, **averages, "dsmall": dsmall})
    return dsmall, dweight, dbias, sums["dpredict"].sum(0)


@head_backward.register_fake
def _(dlogits: Tensor, small: Tensor, weight: Tensor, bias: Tensor, predict: Tensor, *_: object):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (small, weight, bias, predict))


def in_torch(
    small: Tensor, weight: Tensor, bias: Tensor, predict: Tensor, predict_bias: Tensor, eps: float, size: list[int]
) -> Tensor:
    """The logits of `trained` by torch, of any dtype, with the large map."""
    height, width, scale = size
    down, across = (shifted_upsampling(length, scale).to(small) for length in (height, width))
    maps = small.unflatten(1, (height, width)).unflatten(3, (-1, 3, 3, GROUP))
    large = torch.einsum("bhwgijc,Yhi,Xwj->bgcYX", maps, down, across).flatten(1, 2)
    normal = F.batch_norm(large, None, None, weight, bias, training=True, eps=eps)
    return F.conv2d(F.gelu(normal), predict[:, :, None, None], predict_bias)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, dlogits: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    """Gradients by the kernel, or by torch if they need gradients of their own."""
    if dlogits is None:
        return (None,) * 7
    *inputs, mean, variance = ctx.saved_tensors
    if torch.is_grad_enabled():
        copies = [tensor.view_as(tensor) for tensor in inputs]
        wanted = [index for index in range(len(inputs)) if ctx.needs_input_grad[index]]
        y = in_torch(*copies, eps=ctx.eps, size=ctx.size)
        found = torch.autograd.grad(y, [copies[index] for index in wanted], dlogits, create_graph=True)
        gradients = dict(zip(wanted, found, strict=True))
        return tuple(gradients.get(index) for index in range(7))
    gradients = torch.ops.pamm.head_backward(dlogits, *inputs[:4], mean, variance, ctx.eps, ctx.size)
    return (*gradients, dlogits.sum((0, 2, 3)), None, None)


kernel_head.register_autograd(_backward, setup_context=_keep)


@lru_cache(maxsize=64)
def _terms(length: int, scale: int) -> tuple[Tensor, Tensor]:
    """Of every large position the entries (small position · 3 + tap) it is the sum of, and their shares, (length·scale, TERMS)."""
    return _largest(shifted_upsampling(length, scale).flatten(1).float(), TERMS)


@lru_cache(maxsize=64)
def _receivers(length: int, scale: int) -> tuple[Tensor, Tensor]:
    """Of every small position · 3 + tap the large positions it goes to, and its shares, (length·3, the most there are)."""
    matrix = shifted_upsampling(length, scale).flatten(1).T.float()
    return _largest(matrix, int((matrix != 0).sum(1).max()))


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places (int32) and values of every row's entries that are not zero; where they are fewer, its first one with the value 0."""
    matrix = F.pad(matrix, (0, max(0, count - matrix.shape[1])))
    values, places = matrix.topk(count, dim=1)
    places = torch.where(values == 0, places[:, :1], places)
    return places.int().contiguous(), values.contiguous()


def _run(part: str, small: Tensor, size: list[int], outputs: int, arrays: dict[str, Tensor]) -> None:
    """Fill the arrays that a pass writes. Raises ValueError for tensors of another size or dtype."""
    _check(small, size, outputs, arrays)
    height, width, scale = size
    row_from, row_share = _terms(height, scale)
    column_from, column_share = _terms(width, scale)
    column_to, column_given = _receivers(width, scale)
    channels, sizes = small.shape[2] // 9, (height, width, height * scale, width * scale)
    problem = _Head(len(small), *sizes, channels, outputs, column_to.shape[1])
    tables = {"row_from": row_from, "row_share": row_share, "column_from": column_from, "column_share": column_share}
    tables |= {"column_to": column_to, "column_given": column_given, "small": small}
    held = {name: tensor.contiguous() for name, tensor in (tables | arrays).items()}
    for name, tensor in held.items():
        setattr(problem, name, tensor.data_ptr())
    library, threads = KERNEL.library(), torch.get_num_threads()
    problem.work = KERNEL.workspace("work", threads * library.head_workspace(ctypes.byref(problem)))
    library.head_run(ctypes.byref(problem), PASSES.index(part), threads, openmp())


def _check(small: Tensor, size: list[int], outputs: int, arrays: dict[str, Tensor]) -> None:
    """Raises ValueError for arguments that the kernel would read or write wrongly."""
    height, width, scale = size
    if (
        small.dim() != 3
        or small.shape[1] != height * width
        or small.dtype != torch.float32
        or small.shape[2] % (9 * GROUP)
    ):
        raise ValueError(
            f"found products {tuple(small.shape)} {small.dtype} of a {height}×{width} map; expected (B, {height * width}, "
            f"9 · a multiple of {GROUP}) in float32"
        )
    images, channels, large = len(small), small.shape[2] // 9, (height * scale, width * scale)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("mean", "squares", "dshift", "dfactor"), (images, channels))
    shapes |= {"predict": (outputs, channels), "dpredict": (images, outputs, channels), "bias": (outputs,)}
    shapes |= {"logits": (images, outputs, *large), "dlogits": (images, *large, outputs), "dsmall": tuple(small.shape)}
    for name, tensor in arrays.items():
        shape, dtype = shapes.get(name, (channels,)), torch.float64 if name in ("mean", "squares") else torch.float32
        if tensor.shape != shape or tensor.dtype != dtype:
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"found {found} for '{name}' of a head of {channels} channels; expected {shape} {dtype}")
