"""Layers that this package computes with C kernels of its own on a CPU, and torch's forms of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pamm.kernels import accelerate, matrix, mixed_convolution, winograd
from pamm.kernels.conv_head import SmallMapHead
from pamm.models.pamm import ConvHead
from pamm.nn.replace import taking_over
from speed import BenchError
from speed.measure import Candidate, Workload

CASES: dict[str, dict[str, int]] = {
    "convolution-b": {"channels": 768, "outputs": 768, "height": 32, "width": 32},
    "convolution-b-tasks": {"channels": 768, "outputs": 3840, "height": 32, "width": 32},
    "convolution-l": {"channels": 1024, "outputs": 1024, "height": 32, "width": 32},
    "head-b": {"channels": 768, "outputs": 21, "height": 32, "width": 32},
    "experts-b": {"channels": 1536, "outputs": 16, "height": 28, "width": 36},
    "experts-l": {"channels": 2048, "outputs": 64, "height": 32, "width": 32},
    "product-b": {"tasks": 1, "rows": 1025, "inputs": 768, "outputs": 3072},
    "product-b-tasks": {"tasks": 5, "rows": 1024, "inputs": 768, "outputs": 1536},
    "product-l": {"tasks": 1, "rows": 1025, "inputs": 1024, "outputs": 4096},
}
"""PAMM's 3×3 convolutions, the second of them of five tasks at once, and a head of 21
classes; one task's parameter B or C of one stage of the released PAMM, NYUD-v2's ViT-B and PASCAL-Context's ViT-L; the first layer
of the ViTs' MLPs and the layer in front of PAMM's scan, of five tasks at once."""

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
    runs = LEARNING[kind](backward, **shape) if kind in LEARNING else _experts(**shape)
    chosen = [only] if only else list(runs)
    return Workload({candidate: Candidate(runs[candidate]) for candidate in chosen}, shape | {"layer": name})


def _convolution(backward: bool, *, channels: int, outputs: int, height: int, width: int) -> dict[str, Run]:
    last = torch.channels_last
    x = torch.randn(1, channels, height, width).contiguous(memory_format=last)
    weight = torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5
    bias, dy = torch.randn(outputs), torch.randn(1, outputs, height, width).contiguous(memory_format=last)

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    given = {"x": x, "weight": weight, "bias": bias}
    return _forms({"pamm": winograd.convolution_3x3, "torch": torchs}, given, dy, backward)


def _product(backward: bool, *, tasks: int, rows: int, inputs: int, outputs: int) -> dict[str, Run]:
    x, dy = torch.randn(tasks, rows, inputs), torch.randn(tasks, rows, outputs)
    weight, bias = torch.randn(tasks, outputs, inputs) / inputs**0.5, torch.randn(tasks, 1, outputs)

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias, x, weight.mT)

    given = {"x": x, "weight": weight, "bias": bias}
    return _forms({"pamm": matrix.batched_linear, "torch": torchs}, given, dy, backward)


def _head(backward: bool, *, channels: int, outputs: int, height: int, width: int) -> dict[str, Run]:
    """In training, or as it infers; torch's form multiplies the taps by a convolution."""
    layer = taking_over(SmallMapHead, ConvHead(channels, outputs).train(backward), ConvHead)
    accelerate(layer, training=backward)
    x, dy = torch.randn(1, height, width, channels).permute(0, 3, 1, 2), torch.randn(1, outputs, 4 * height, 4 * width)
    forms = {"pamm": layer.by_kernel, "torch": layer.by_torch if backward else layer.by_tiles}

    def run(form: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.set_grad_enabled(backward):
            return form(x)

    own = {name: lambda x, *_, form=form: run(form, x) for name, form in forms.items()}
    return _forms(own, {"x": x, **dict(layer.named_parameters())}, dy, backward)


def _forms(
    forms: Mapping[str, Callable[..., Tensor]], given: Mapping[str, Tensor], dy: Tensor, backward: bool
) -> dict[str, Run]:
    """The layer's output, or the gradients of the inputs by name where its own is dy."""
    inputs = {name: tensor.requires_grad_(backward) for name, tensor in given.items()}

    def both(form: Callable[..., Tensor]) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(form(*inputs.values()), list(inputs.values()), dy)
        return dict(zip(inputs, gradients, strict=True))

    if backward:
        return {name: lambda form=form: both(form) for name, form in forms.items()}
    return {name: lambda form=form: form(*inputs.values()) for name, form in forms.items()}


LEARNING = {"convolution": _convolution, "head": _head, "product": _product}
"""Kinds of layers whose kernels have a backward pass, and what makes their forms."""


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
