"""Matrix products in float32 by whatever is fastest on this processor.

On x86 torch multiplies float32 matrices with MKL and convolves with oneDNN. On processors of other makers than Intel MKL does
not use the widest vectors: there a 1×1 convolution, the same sum, takes half the time, forward and backward, and a C kernel
(`pamm.ops.matrix`), which reads and writes every layout and all tasks in one call, still less.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pamm.ops import matrix
from pamm.ops.compiled import exporting, left_to_torch
from pamm.ops.winograd import Convolution3x3, convolves_3x3

SMALLEST = 1 << 24
"""Multiplications from which on a convolution pays; below, starting one takes longer than the product."""

FEWEST_ROWS, SMALLEST_WEIGHT = 32, 1 << 15
"""Rows and weights of a product from which on the C kernel pays beside oneDNN: it copies both first."""


def by_convolution() -> bool:
    """Whether products run faster as convolutions: oneDNN beside MKL on an x86 processor that is not Intel's."""
    if platform.machine().lower() not in ("x86_64", "amd64", "x86"):
        return False
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and "Intel" not in _maker()


def _maker() -> str:
    """Who made the processor, e.g. "AuthenticAMD"; "Intel" where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.environ.get("PROCESSOR_IDENTIFIER", "Intel")
    return next((line for line in lines if line.startswith("vendor_id")), "Intel")


BY_CONVOLUTION = by_convolution()


def objection() -> str | None:
    """Why the C kernel takes no products on this machine, or None."""
    if not BY_CONVOLUTION:
        return "its products are fast on this processor"
    return matrix.objection()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b, as `torch.nn.functional.linear`: (..., i), (o, i), (o,) → (..., o). Any device and dtype, differentiable."""
    fits = x.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])
    if not (fits and _replaces_torch(x, weight, bias, x.numel() * len(weight))):
        return F.linear(x, weight, bias)
    rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], len(weight))
    if not _by_kernel(len(rows), weight.numel()):
        return _convolve(rows, weight, bias).view(shape)
    return torch.ops.pamm.product(rows[None], weight.T[None], None if bias is None else bias[None], False).view(shape)


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One product per entry of the leading axis: (T, n, i), (T, i, o), (T, 1, o) → (T, n, o). As `torch.baddbmm`."""
    fits = x.shape[::2] == weight.shape[:2] and (bias is None or bias.shape == (len(x), 1, weight.shape[2]))
    if not (fits and _replaces_torch(x, weight, bias, x[0].numel() * weight.shape[2])):
        return _torchs_batched_linear(x, weight, bias)
    if not _by_kernel(x.shape[1], weight[0].numel()):
        biases = [None] * len(weight) if bias is None else bias.flatten(1).unbind()
        parts = zip(x.unbind(), weight.mT.unbind(), biases, strict=True)
        return torch.stack([_convolve(rows, w, b) for rows, w, b in parts])
    return torch.ops.pamm.product(x, weight, None if bias is None else bias.flatten(1), False)


def _torchs_batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of single rows so that the gradient of weights whose inputs lie side by side comes in their layout, else it is copied."""
    if x.shape[1] == 1 and weight.stride(1) == 1 and not exporting():
        columns = weight.mT, x.mT
        return (torch.bmm(*columns) if bias is None else torch.baddbmm(bias.mT.to(x.dtype), *columns)).mT
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.to(x.dtype), x, weight)


class Linear(nn.Linear):
    """`torch.nn.Linear` whose product is `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def channels_last(maps: Tensor) -> Tensor:
    """(B, C, h, w) with the channels of a pixel side by side in memory, as convolutions recognise it."""
    rows = maps.permute(0, 2, 3, 1)
    return rows.reshape(-1).view(rows.shape).permute(0, 3, 1, 2)


def adopt(module: nn.Module) -> None:
    """Make every `torch.nn.Linear` in a module a `Linear` and 3×3 convolutions `Convolution3x3`, parameters and names the same.

    The weights of 3×3 convolutions are laid out as channels-last maps need them, instead of at every call. So they are again
    whenever a state is loaded, since a layout decides how the last digit is rounded.
    """
    module.register_load_state_dict_post_hook(_adopt_loaded)
    _adopt(module)


def _adopt_loaded(module: nn.Module, _: object) -> None:
    _adopt(module)


def _adopt(module: nn.Module) -> None:
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear
        elif isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3):
            part.to(memory_format=torch.channels_last)
            if type(part) is nn.Conv2d and convolves_3x3(part):
                part.__class__ = Convolution3x3


def _replaces_torch(x: Tensor, weight: Tensor, bias: Tensor | None, multiplications: int) -> bool:
    """Not under autocast, which asks for another dtype, nor in an exported graph, which may run on any machine."""
    return (
        BY_CONVOLUTION
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, weight, bias) if t is not None)
        and not torch.is_autocast_enabled("cpu")
        and not exporting()
        and multiplications >= SMALLEST
    )


def _by_kernel(rows: int, weights: int) -> bool:
    """Whether the C kernel takes a product that is not left to torch's matrix product; else oneDNN does."""
    return rows >= FEWEST_ROWS and weights >= SMALLEST_WEIGHT and not left_to_torch() and matrix.available()


def _convolve(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, i), (o, i), (o,) → (n, o): the rows are the pixels of one channels-last image."""
    image = rows.contiguous().view(1, 1, *rows.shape).permute(0, 3, 1, 2)
    maps = F.conv2d(image, weight[:, :, None, None], bias)
    return maps.permute(0, 2, 3, 1).reshape(len(rows), -1)
