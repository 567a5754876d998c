"""3×3 convolutions by minimal filtering against torch's convolution in float64, and which layers use them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernels import (
    NARROWER,
    assert_compiles_to_one_graph,
    assert_same_bits_for_any_number_of_threads,
    freshly_compiled,
    needs_x86,
)
from torch import Tensor, nn

from pamm.ops import winograd as module
from pamm.ops.product import adopt
from pamm.ops.winograd import KERNEL, Convolution3x3, convolution_3x3

needs_compiler = pytest.mark.skipif(KERNEL.unavailable() is not None, reason="no C compiler here")
TOLERANCE = 5e-6
"""Largest error, relative to the largest output; torch's own direct convolution: 1e-6."""

CASES = {
    "one position": {"height": 1, "width": 1},
    "one channel": {"channels": 1, "outputs": 1},
    "whole tiles": {"height": 16, "width": 16, "channels": 32, "outputs": 32},
    "odd": {"images": 2, "height": 13, "width": 10, "channels": 37, "outputs": 41},
    "several runs of tiles": {"images": 2, "height": 37, "width": 50},
    "as in a decoder": {"height": 28, "width": 36, "channels": 768, "outputs": 96},
}


def problem(images=1, height=9, width=14, channels=40, outputs=33) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5
    return torch.randn(images, channels, height, width).relu(), weight, torch.randn(outputs)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_kernel_is_the_convolution(case):
    x, weight, bias = problem(**CASES[case])
    for added in (bias, None):
        found = torch.ops.pamm.convolution_3x3(x, weight, added)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert error(found, exact(x, weight, added)) < TOLERANCE


@needs_compiler
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_the_convolutions(case, layout):
    """With the output's gradient in either layout, of x, weights and bias."""
    given = [tensor.requires_grad_() for tensor in problem(**CASES[case])]
    expected = exact(*given)
    direction = torch.randn(expected.shape).contiguous(memory_format=layout)
    found = torch.autograd.grad(torch.ops.pamm.convolution_3x3(*given), given, direction)
    for ours, right in zip(found, torch.autograd.grad(expected, given, direction.double()), strict=True):
        assert ours.shape == right.shape and error(ours, right) < TOLERANCE


@needs_compiler
@pytest.mark.parametrize("wanted", range(3))
def test_one_gradient_alone(wanted):
    given = problem()
    given[wanted].requires_grad_()
    torch.ops.pamm.convolution_3x3(*given).square().sum().backward()
    found = given[wanted].grad
    assert error(found, torch.autograd.grad(exact(*given).square().sum(), given[wanted])[0]) < TOLERANCE


@needs_compiler
def test_any_layout():
    x, weight, bias = problem(2)
    expected = torch.ops.pamm.convolution_3x3(x, weight, bias)
    last = torch.channels_last
    for other in (
        (x.contiguous(memory_format=last), weight.contiguous(memory_format=last)),
        (x.transpose(2, 3).contiguous().transpose(2, 3), weight.flip(0).flip(0)),
        (torch.cat([x, x], dim=1).contiguous(memory_format=last)[:, : x.shape[1]], weight),
    ):
        assert torch.equal(torch.ops.pamm.convolution_3x3(*other, bias), expected)


@needs_compiler
def test_same_bits_for_any_number_of_threads():
    given = [tensor.requires_grad_() for tensor in problem(2, 30, 40, 70, 90)]

    def step() -> list[Tensor]:
        y = torch.ops.pamm.convolution_3x3(*given)
        return [y, *torch.autograd.grad(y.square().sum(), given)]

    assert_same_bits_for_any_number_of_threads(step)


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own checker's
def test_registration_as_an_operator():
    x, weight, bias = (tensor.requires_grad_() for tensor in problem())
    torch.library.opcheck(torch.ops.pamm.convolution_3x3.default, (x, weight, bias))
    dy = torch.randn(1, len(weight), *x.shape[2:])
    torch.library.opcheck(torch.ops.pamm.convolution_3x3_input.default, (dy, weight.detach()))
    torch.library.opcheck(torch.ops.pamm.convolution_3x3_weight.default, (dy, x.detach()))


@needs_compiler
def test_compiles_to_one_graph():
    chosen = "module.FEWEST_CHANNELS = 1"
    assert_compiles_to_one_graph("test_winograd", "convolution_3x3(*given) + 1", before=chosen)


@needs_compiler
@needs_x86
@pytest.mark.parametrize("narrower", NARROWER)
def test_kernel_of_older_processors(narrower, tmp_path):
    code = (
        "for case in CASES:\n"
        "    test_kernel_is_the_convolution(case)\n"
        "    test_gradients_are_the_convolutions(case, torch.channels_last)"
    )
    freshly_compiled("test_winograd", code, narrower, tmp_path)


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """Notes every use of the kernel, on a machine that has it."""
    if not module._available():
        pytest.skip("the kernel does not run here")
    noted = []

    def note(*tensors: Tensor) -> Tensor:
        noted.append(True)
        return module.kernel_convolution(*tensors)

    monkeypatch.setattr(torch.ops.pamm, "convolution_3x3", note)
    return noted


def test_layers_of_a_network_are_adopted(calls):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.Conv2d(128, 130, 3, padding=1, bias=False)).eval()
    x = torch.randn(2, 128, 6, 7)
    expected = layers(x)
    adopt(layers)
    with torch.no_grad():
        assert error(layers(x), expected) < TOLERANCE
    assert len(calls) == 2 and all(type(layer) is Convolution3x3 for layer in layers)


OTHERS = {
    "strided": {"stride": 2, "padding": 1},
    "unpadded": {},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2, "padding": 1},
    "reflecting": {"padding": 1, "padding_mode": "reflect"},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_layers_are_left_to_torch(case, calls):
    layers = nn.Sequential(nn.Conv2d(128, 128, 3, **OTHERS[case])).eval()
    x = torch.randn(1, 128, 6, 7)
    expected = layers(x)
    adopt(layers)
    with torch.no_grad():
        torch.testing.assert_close(layers(x), expected, rtol=1e-5, atol=1e-5)
    assert not calls and type(layers[0]) is nn.Conv2d


def test_torchs_own_convolution_runs_where_it_must(calls):
    x, weight, bias = problem(channels=128, outputs=128)
    with torch.no_grad():
        convolution_3x3(x.double(), weight.double(), bias.double())
        convolution_3x3(x[:, :127], weight[:, :127], bias)
        with torch.autocast("cpu", torch.bfloat16):
            assert convolution_3x3(x, weight, bias).dtype == torch.bfloat16
        assert not calls
        assert error(convolution_3x3(x, weight, bias), exact(x, weight, bias)) < TOLERANCE
    assert calls
