"""Layers that this package computes with C kernels of its own on a CPU, and torch's forms of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pamm.bench import BenchError
from pamm.bench.measure import Candidate, Workload
from pamm.ops import attention, mixed_convolution, product, winograd

CASES: dict[str, dict[str, int]] = {
    "attention-b": {"heads": 12, "tokens": 1025, "width": 64},
    "attention-l": {"heads": 16, "tokens": 1025, "width": 64},
    "convolution-b": {"channels": 768, "outputs": 768, "height": 32, "width": 32},
    "convolution-b-tasks": {"channels": 768, "outputs": 3840, "height": 32, "width": 32},
    "convolution-l": {"channels": 1024, "outputs": 1024, "height": 32, "width": 32},
    "experts-b": {"channels": 1536, "outputs": 16, "height": 28, "width": 36},
    "experts-l": {"channels": 2048, "outputs": 64, "height": 32, "width": 32},
    "product-b": {"tasks": 1, "rows": 1025, "inputs": 768, "outputs": 3072},
    "product-b-tasks": {"tasks": 5, "rows": 1024, "inputs": 768, "outputs": 1536},
    "product-l": {"tasks": 1, "rows": 1025, "inputs": 1024, "outputs": 4096},
}
"""Attention of ViT-B and ViT-L at 512²; PAMM's 3×3 convolutions, the second of them of five tasks at once; one task's parameter B
or C of one stage of the released PAMM, NYUD-v2's ViT-B and PASCAL-Context's ViT-L; the first layer of the ViTs' MLPs and the layer
in front of PAMM's scan, of five tasks at once."""

LEARNING = ("convolution", "product")
"""Kinds of layers whose kernels have a backward pass."""

RANK, EXPERTS, CHOSEN, TAPS = 4, 15, 9, 9
"""Of the released experts; one more bottleneck of that rank belongs to the task."""

Run = Callable[[], Tensor | dict[str, Tensor]]


def workload(settings: Mapping[str, Any], only: str | None = None) -> Workload:
    """Candidates "pamm" and "torch", or the one named. settings: layer, a name in CASES; backward. In float32, on the CPU."""
    name, backward = settings["layer"], settings["backward"]
    if settings["device"] != "cpu" or settings["dtype"] != "float32":
        raise BenchError(
            f"found {settings['device']} and {settings['dtype']}; these kernels are measured on the CPU in float32"
        )
    kind, shape = name.split("-")[0], CASES[name]
    if backward and kind not in LEARNING:
        raise BenchError(f"{name}: the kernel has no backward pass; measure --what forward")
    if kind in LEARNING:
        runs = {"convolution": _convolution, "product": _product}[kind](backward, **shape)
    else:
        runs = {"attention": _attention, "experts": _experts}[kind](**shape)
    chosen = [only] if only else list(runs)
    return Workload({candidate: Candidate(runs[candidate]) for candidate in chosen}, shape | {"layer": name})


def _attention(*, heads: int, tokens: int, width: int) -> dict[str, Run]:
    q, k, v = torch.randn(1, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    return {
        "pamm": lambda: attention.attention(q, k, v),
        "torch": lambda: F.scaled_dot_product_attention(q, k, v),
    }


def _convolution(backward: bool, *, channels: int, outputs: int, height: int, width: int) -> dict[str, Run]:
    last = torch.channels_last
    x = torch.randn(1, channels, height, width).contiguous(memory_format=last)
    weight = (torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5).contiguous(memory_format=last)
    bias, dy = torch.randn(outputs), torch.randn(1, outputs, height, width).contiguous(memory_format=last)

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    return _forms({"pamm": winograd.convolution_3x3, "torch": torchs}, [x, weight, bias], dy, backward)


def _product(backward: bool, *, tasks: int, rows: int, inputs: int, outputs: int) -> dict[str, Run]:
    x, dy = torch.randn(tasks, rows, inputs), torch.randn(tasks, rows, outputs)
    weight, bias = (torch.randn(tasks, outputs, inputs) / inputs**0.5).mT, torch.randn(tasks, 1, outputs)

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias, x, weight)

    return _forms({"pamm": product.batched_linear, "torch": torchs}, [x, weight, bias], dy, backward)


def _forms(forms: dict[str, Callable[..., Tensor]], given: list[Tensor], dy: Tensor, backward: bool) -> dict[str, Run]:
    """Forward, or forward and the gradients of x, weight and bias."""
    given = [tensor.requires_grad_(backward) for tensor in given]

    def both(form: Callable[..., Tensor]) -> dict[str, Tensor]:
        return dict(zip(("x", "weight", "bias"), torch.autograd.grad(form(*given), given, dy), strict=True))

    if backward:
        return {name: lambda form=form: both(form) for name, form in forms.items()}
    return {name: lambda form=form: form(*given) for name, form in forms.items()}


def _experts(*, channels: int, outputs: int, height: int, width: int) -> dict[str, Run]:
    scale = (TAPS**2 * channels) ** -0.5
    base, shared, own = (scale * torch.randn(count, channels, TAPS, TAPS) for count in (outputs, EXPERTS * RANK, RANK))
    weights = torch.randn(outputs, (EXPERTS + 1) * RANK)
    weights[:, CHOSEN * RANK : EXPERTS * RANK] = 0
    x = torch.randn(height, width, channels)
    return {
        "pamm": lambda: mixed_convolution.mixed_convolution(x, base, [shared, own], weights),
        "torch": lambda: mixed_convolution.in_torch(x, base, [shared, own], weights),
    }
