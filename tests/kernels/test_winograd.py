"""3×3 convolutions by minimal filtering against torch's convolution in float64, and which layers use them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from c_kernels import (
    NARROWER,
    assert_compiles_to_one_graph,
    assert_same_bits_for_any_number_of_threads,
    needs_x86,
    not_yet_loaded,
)
from pamm.kernels import accelerate
from pamm.kernels import winograd as module
from pamm.kernels.winograd import KERNEL, KernelConv3x3, convolution_3x3

needs_compiler = pytest.mark.skipif(KERNEL.unavailable() is not None, reason="no C compiler here")
TOLERANCE = 5e-6
"""Largest error, relative to the largest output; torch's own direct convolution: 1e-6."""

CASES = {
    "one position": {"height": 1, "width": 1},
    "one channel": {"channels": 1, "outputs": 1},
    "whole tiles": {"height": 16, "width": 16, "channels": 32, "outputs": 32},
    "odd": {"images": 2, "height": 13, "width": 10, "channels": 37, "outputs": 41},
    "several runs of tiles": {"images": 2, "height": 37, "width": 50},
    "several chunks of channels": {"images": 2, "height": 20, "width": 40, "channels": 2100, "outputs": 70},
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
def test_compiles_to_one_graph(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "FEWEST_CHANNELS", 1)
    monkeypatch.setattr(module, "FEWEST_TILES", 1)
    given = problem()
    assert_compiles_to_one_graph(lambda: convolution_3x3(*given) + 1, module, tmp_path)


@needs_compiler
@needs_x86
@pytest.mark.parametrize("narrower", NARROWER)
def test_kernel_of_older_processors(narrower, tmp_path):
    with not_yet_loaded(module, tmp_path, narrower):
        for case in CASES:
            test_kernel_is_the_convolution(case)
            test_gradients_are_the_convolutions(case, torch.channels_last)


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


def test_layers_of_a_network_are_replaced(calls):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.Conv2d(128, 130, 3, padding=1, bias=False)).eval()
    x = torch.randn(2, 128, 14, 15)
    expected = layers(x)
    accelerate(layers, training=False)
    with torch.no_grad():
        assert error(layers(x), expected) < TOLERANCE
    assert len(calls) == 2 and all(type(layer) is KernelConv3x3 for layer in layers)


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
    x = torch.randn(1, 128, 14, 15)
    expected = layers(x)
    accelerate(layers, training=False)
    with torch.no_grad():
        torch.testing.assert_close(layers(x), expected, rtol=1e-5, atol=1e-5)
    assert not calls and type(layers[0]) is nn.Conv2d


def test_torchs_own_convolution_runs_where_it_must(calls):
    x, weight, bias = problem(channels=128, outputs=128, height=14, width=15)
    with torch.no_grad():
        convolution_3x3(x.double(), weight.double(), bias.double())
        convolution_3x3(x[:, :127], weight[:, :127], bias)
        with torch.autocast("cpu", torch.bfloat16):
            assert convolution_3x3(x, weight, bias).dtype == torch.bfloat16
        convolution_3x3(x[..., :12, :12], weight, bias)  # too small to pay
        assert not calls
        assert error(convolution_3x3(x, weight, bias), exact(x, weight, bias)) < TOLERANCE
    assert calls


def test_mistakes_get_torchs_message(calls):
    x, weight, bias = problem(channels=128, outputs=128, height=14, width=15)
    for given in (
        (torch.cat([x, x], dim=1), weight, bias),
        (x, weight, bias.double()),
        (x, weight, bias[:3]),
        (x[..., :0], weight, bias),
    ):
        with pytest.raises(RuntimeError) as torchs:
            F.conv2d(*given, padding=1)
        with pytest.raises(RuntimeError) as ours:
            convolution_3x3(*given)
        assert str(ours.value) == str(torchs.value)
    assert not calls


@needs_compiler
def test_the_operators_refuse_what_they_would_read_wrongly():
    x, weight, bias = problem()
    for call in (
        lambda: torch.ops.pamm.convolution_3x3(x[:, 1:], weight, bias),
        lambda: torch.ops.pamm.convolution_3x3(x, weight, bias.double()),
        lambda: torch.ops.pamm.convolution_3x3_input(x, weight),
        lambda: torch.ops.pamm.convolution_3x3_weight(x.double(), x),
        lambda: torch.ops.pamm.convolution_3x3(x[:, :0], weight[:, :0], bias),
    ):
        with pytest.raises(ValueError, match=r"expected maps of \d+ channels, all float32"):
            call()
    with pytest.raises(ValueError, match="expected the same images and positions"):
        torch.ops.pamm.convolution_3x3_weight(x[..., 1:], x)


@needs_compiler
def test_gradients_do_not_depend_on_the_default_dtype():
    x, weight, bias = (tensor.requires_grad_() for tensor in problem())
    y = torch.ops.pamm.convolution_3x3(x, weight, bias)
    torch.set_default_dtype(torch.float64)
    try:
        found = torch.autograd.grad(y.square().sum(), weight)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert error(found, torch.autograd.grad(exact(x, weight, bias).square().sum(), weight)[0]) < TOLERANCE


@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch's own use
def test_derivatives_of_other_kinds_are_torchs(calls):
    """Second derivatives, forward mode, torch.func."""
    x, weight, bias = problem(channels=128, outputs=128, height=14, width=15)
    x.requires_grad_()

    def slope(convolve, x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(convolve(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    def ours(x: Tensor) -> Tensor:
        return convolution_3x3(x, weight, bias)

    def torchs(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    assert error(slope(ours, x), slope(torchs, x)) < TOLERANCE
    assert calls
    x = x.detach()
    for derive in (
        lambda f: torch.func.jvp(f, (x,), (x,))[1],
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
    ):
        torch.testing.assert_close(derive(ours), derive(torchs))


@pytest.mark.filterwarnings("ignore:`torch.jit")  # tracing is what older exporters do
def test_graphs_for_other_machines_hold_torchs_convolution(calls):
    layer = KernelConv3x3(128, 128, 3, padding=1)
    x = torch.randn(1, 128, 16, 16)
    exported = torch.export.export(layer, (x,))
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert "ops.pamm" not in str(exported.graph) and "pamm::" not in str(traced.inlined_graph) and not calls
