"""Counting the operations of matrix products and convolutions: two per product, as they are really carried out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pamm.kernels import head, matrix, mixed_convolution, winograd

Shape = Sequence[int]


def operations() -> Any:
    """A counter, a context with `get_total_flops()`."""
    from torch.utils.flop_counter import FlopCounterMode

    own = {
        head.kernel_head: _head,
        head.head_logits: _head,
        head.head_backward: _head_backward,
        matrix.kernel_product: _product,
        mixed_convolution.kernel_convolution: _mixed_convolution,
        winograd.kernel_convolution: _winograd,
        winograd.input_gradient: _winograd,
        winograd.weight_gradient: _winograd_weight,
    }
    mapping = {operator._opoverload.overloadpacket: formula for operator, formula in own.items()}
    mapping[torch.ops.aten.convolution_backward] = _convolution_backward
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _convolution_backward(gradient: Shape, x: Shape, weight: Shape, *options: Any, **_) -> int:
    """Shapes and options of torch's operator → operations. Torch counts grouped convolutions as if they had one group."""
    transposed, wanted = options[4], options[7][:2]
    positions = (x if transposed else gradient)[2:]
    return sum(wanted) * 2 * x[0] * math.prod(positions) * math.prod(weight)


def _head(small: Shape, factor: Shape, shift: Shape, predict: Shape, *others: Any, **_) -> int:
    """The 1×1 convolution of the large map; what makes that map's rows is not counted."""
    height, width, scale = others[-1]
    return 2 * small[0] * height * width * scale**2 * math.prod(predict)


def _head_backward(dlogits: Shape, small: Shape, weight: Shape, *others: Any, **_) -> int:
    """The 1×1 convolution's gradient of its input, twice, and of its weights."""
    return 3 * 2 * math.prod(dlogits) * weight[0]


def _product(a: Shape, b: Shape, *others: Any, **_) -> int:
    return 2 * math.prod(a) * b[2]


def _winograd(x: Shape, weight: Shape, *bias: Any, **_) -> int:
    """36 products per channel in, channel out and tile of 4×4 positions, where a direct convolution has 144."""
    return _tile_products(x) * weight[0] * weight[1]


def _winograd_weight(gradient: Shape, x: Shape, **_) -> int:
    return _tile_products(x) * gradient[1] * x[1]


def _tile_products(x: Shape) -> int:
    return 2 * 36 * x[0] * math.ceil(x[2] / 4) * math.ceil(x[3] / 4)


def _mixed_convolution(x: Shape, base: Shape, *others: Any, **_) -> int:
    """130 complex products per channel in, channel out and square of 8×8 positions; what mixes the kernels is not counted."""
    height, width, channels = x
    return 2 * 4 * 130 * math.ceil(height / 8) * math.ceil(width / 8) * channels * base[0]
