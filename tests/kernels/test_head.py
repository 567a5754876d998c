"""The head behind its taps: against interpolation, convolution, normalisation, GELU and prediction in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from c_kernels import (
    NARROWER,
    assert_compiles_to_one_graph,
    assert_same_bits_for_any_number_of_threads,
    needs_x86,
    not_yet_loaded,
)
from pamm.kernels import head as module
from pamm.kernels.head import KERNEL, in_torch, logits, taps, trained

needs_compiler = pytest.mark.skipif(KERNEL.unavailable() is not None, reason="no C compiler here")
EPS = 1e-5
TOLERANCE = 2e-6
"""Largest error, relative to the largest value."""

CASES = {
    "one position": {"height": 1, "width": 1},
    "one row": {"height": 1, "width": 7},
    "one column, one output": {"height": 9, "width": 1, "outputs": 1},
    "batch": {"images": 3, "height": 5, "width": 6, "channels": 48, "outputs": 7},
    "twice the size": {"height": 4, "width": 9, "scale": 2},
    "three times the size": {"images": 2, "height": 3, "width": 5, "scale": 3, "outputs": 21},
    "as it is": {"height": 5, "width": 4, "scale": 1},
    "more outputs than columns": {"height": 2, "width": 1, "scale": 2, "outputs": 60},
}


def problem(images=1, height=5, width=6, inputs=24, channels=32, outputs=5, scale=4) -> tuple[list[Tensor], list[int]]:
    """Products with the taps, and the other tensors of `trained`; h, w and the scale."""
    torch.manual_seed(0)
    x = torch.randn(images, height * width, inputs)
    weight = torch.randn(channels, inputs, 3, 3) / (9 * inputs) ** 0.5
    norm = torch.rand(channels) + 0.5, torch.randn(channels)
    predict = torch.randn(outputs, channels) / channels**0.5, torch.randn(outputs)
    return [x @ taps(weight).T, *norm, *predict], [height, width, scale]


def plain(x: Tensor, weight: Tensor, scale: int) -> Tensor:
    """The large map, of a map (B, C, h, w) in float64."""
    large = F.interpolate(x.double(), scale_factor=scale, mode="bilinear", align_corners=False)
    return F.conv2d(large, weight.double(), padding=1)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_the_torch_form_is_the_head(scale):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 24, 5, 6), torch.randn(32, 24, 3, 3)
    others = [tensor.double() for tensor in problem()[0][1:]]
    small = x.double().flatten(2).mT @ taps(weight.double()).T
    normal = F.batch_norm(plain(x, weight, scale), None, None, *others[:2], training=True, eps=EPS)
    expected = F.conv2d(F.gelu(normal), others[2][:, :, None, None], others[3])
    assert error(in_torch(small, *others, EPS, [5, 6, scale]), expected) < 1e-6


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_kernel_in_training(case):
    """Logits, statistics and all gradients."""
    given, size = problem(**CASES[case])
    given = [tensor.requires_grad_() for tensor in given]
    found, mean, variance = trained(*given, EPS, size)
    exact = doubles(given)
    expected = in_torch(*exact, EPS, size)
    assert error(found, expected) < TOLERANCE
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, exact, direction.double())
    largest = wanted[0].abs().max()
    for ours, right in zip(torch.autograd.grad(found, given, direction), wanted, strict=True):
        assert ours.shape == right.shape
        assert ((ours - right).abs().max() / max(right.abs().max(), largest)).item() < 10 * TOLERANCE
    assert mean.shape == variance.shape == given[1].shape


@needs_compiler
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_statistics_are_those_of_the_large_map(offset):
    """Also far from zero, where the squares' mean less the mean's square would have no digit left."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 24, 9, 7), torch.randn(32, 24, 3, 3)
    given, size = problem(height=9, width=7)
    given[0] = x.flatten(2).mT @ taps(weight).T
    large = plain(x, weight, 4)
    if offset:
        given[0][..., 4 * 16 : 5 * 16] += offset  # the middle tap of the first channels
        large[:, :16] += offset
    _, mean, variance = trained(*given, EPS, size)
    assert error(mean, large.mean((0, 2, 3))) < TOLERANCE
    assert error(variance, large.var((0, 2, 3), unbiased=False)) < TOLERANCE


@needs_compiler
@pytest.mark.parametrize("inside", [-1.0, 0.0])
def test_variance_beside_borders_and_pixels_far_above_the_rest(inside):
    """A difference of neighbours is small inside a map far from zero, and large at its borders; so is one bright pixel."""
    torch.manual_seed(0)
    x, weight = 0.1 * torch.randn(2, 24, 40, 33) + 100, torch.zeros(16, 24, 3, 3)
    weight[:, :, 0, 0] = weight[:, :, 1, 1] = torch.randn(16, 24) / 24**0.5
    weight[:, :, 0, 1] = weight[:, :, 1, 0] = inside * weight[:, :, 1, 1]
    x[0, :, 0, 0] += 1000
    given, size = problem(height=40, width=33, channels=16)
    given[0] = x.flatten(2).mT @ taps(weight).T
    large = F.conv2d(F.interpolate(x.double(), scale_factor=4, mode="bilinear"), weight.double(), padding=1)
    _, _, variance = trained(*given, EPS, size)
    torch.testing.assert_close(variance, large.var((0, 2, 3), unbiased=False).float(), rtol=2e-5, atol=0)


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_kernel_in_inference(case):
    (small, factor, shift, *predict), size = problem(**CASES[case])
    found = logits(small, factor, shift, *predict, size)
    height, width, scale = size
    taps_first = small.double().unflatten(2, (-1, 3, 3, 16)).permute(0, 2, 5, 3, 4, 1).unflatten(5, (height, width))
    large = sum(
        F.pad(F.interpolate(part, scale_factor=scale, mode="bilinear"), (1 - k, k - 1, 1 - j, j - 1))
        for j in range(3)
        for k in range(3)
        for part in [taps_first[:, :, :, j, k].flatten(1, 2)]
    )
    z = large * factor.double()[:, None, None] + shift.double()[:, None, None]
    assert error(found, F.conv2d(F.gelu(z), predict[0].double()[:, :, None, None], predict[1].double())) < TOLERANCE


@needs_compiler
def test_gelu_far_from_zero_and_of_no_number():
    """A map of one channel's constant value reaches GELU as `factor · value + shift` wherever no border is near."""
    size, value = [3, 3, 4], torch.zeros(1, 9, 9 * 16)
    value[..., 4 * 16] = 1.0
    predict, bias = torch.zeros(1, 16), torch.zeros(1)
    predict[0, 0] = 1
    for z in (-60.0, -12.0, -5.0, -1.0, -1e-6, 0.0, 1e-6, 0.7, 5.0, 12.0, 1e30, float("inf"), float("nan")):
        factor = torch.tensor([z] + 15 * [0.0])
        found = logits(value, factor, torch.zeros(16), predict, bias, size)[0, 0, 6, 6]
        exact = F.gelu(torch.tensor(z, dtype=torch.float64)).float()
        torch.testing.assert_close(found, exact, rtol=2e-6, atol=4e-7, equal_nan=True)


@needs_compiler
def test_sums_over_a_large_map_keep_their_digits():
    given, size = problem(height=96, width=96, inputs=8, channels=16, outputs=2)
    exact, given = doubles(given), [tensor.requires_grad_() for tensor in given]
    direction = torch.rand(1, 2, 384, 384)
    found = torch.autograd.grad(trained(*given, EPS, size)[0], given, direction)
    for ours, right in zip(found, torch.autograd.grad(in_torch(*exact, EPS, size), exact, direction), strict=True):
        assert error(ours, right) < TOLERANCE


@needs_compiler
@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone(wanted):
    given, size = problem()
    exact = doubles(given)
    given[wanted].requires_grad_()
    trained(*given, EPS, size)[0].square().sum().backward()
    right = torch.autograd.grad(in_torch(*exact, EPS, size).square().sum(), exact[wanted])[0]
    assert error(given[wanted].grad, right) < 10 * TOLERANCE


@needs_compiler
def test_gradients_have_gradients():
    given, size = problem(height=2, width=3, channels=16)
    exact, given = doubles(given), [tensor.requires_grad_() for tensor in given]

    def twice(y: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    found = twice(trained(*given, EPS, size)[0], given)
    for ours, right in zip(found, twice(in_torch(*exact, EPS, size), exact), strict=True):
        assert error(ours, right) < 1e-4


@needs_compiler
@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone_has_a_gradient(wanted):
    given, size = problem(height=2, width=3, channels=16)
    exact = doubles(given)
    given[wanted].requires_grad_()

    def twice(y: Tensor, tensor: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(y.square().sum(), tensor, create_graph=True)
        return torch.autograd.grad(first.square().sum(), tensor)[0]

    found = twice(trained(*given, EPS, size)[0], given[wanted])
    assert error(found, twice(in_torch(*exact, EPS, size), exact[wanted])) < 1e-4


@needs_compiler
def test_any_layout():
    given, size = problem(2)
    expected = trained(*given, EPS, size)[0]
    turned = [tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor.flip(0).flip(0) for tensor in given]
    assert torch.equal(trained(*turned, EPS, size)[0], expected)
    dlogits, found = torch.randn_like(expected), []
    for tensors, layout in (
        (given, torch.contiguous_format),
        (given, torch.channels_last),
        (turned, torch.contiguous_format),
    ):
        copies = [tensor.detach().requires_grad_() for tensor in tensors]
        y = trained(*copies, EPS, size)[0]
        found.append(torch.autograd.grad(y, copies, dlogits.contiguous(memory_format=layout)))
    for others in found[1:]:
        for ours, first in zip(others, found[0], strict=True):
            torch.testing.assert_close(ours, first, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_same_bits_for_any_number_of_threads():
    given, size = problem(2, 9, 7, channels=64)
    given = [tensor.requires_grad_() for tensor in given]

    def step() -> list[Tensor]:
        y, *statistics = trained(*given, EPS, size)
        return [y, *statistics, *torch.autograd.grad(y.square().sum(), given)]

    assert_same_bits_for_any_number_of_threads(step)


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own checker's
def test_registration_as_an_operator():
    given, size = problem(2)
    (small, factor, shift, *predict), _ = given, size
    torch.library.opcheck(torch.ops.pamm.head_logits.default, (small, factor, shift, *predict, size))
    found = trained(*given, EPS, size)
    arguments = (torch.randn_like(found[0]), *given[:4], *found[1:], EPS, size)
    torch.library.opcheck(torch.ops.pamm.head_backward.default, arguments)
    given = [tensor.requires_grad_() for tensor in given]
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(torch.ops.pamm.head.default, (*given, EPS, size), test_utils=tests)


@needs_compiler
def test_compiles_to_one_graph(tmp_path):
    given, size = problem()
    assert_compiles_to_one_graph(lambda: logits(*given, size), module, tmp_path)


@needs_compiler
@needs_x86
@pytest.mark.parametrize("narrower", NARROWER)
def test_kernel_of_older_processors(narrower, tmp_path):
    with not_yet_loaded(module, tmp_path, narrower):
        for case in ("one column, one output", "batch", "three times the size"):
            test_kernel_in_training(case)
            test_kernel_in_inference(case)
        test_gelu_far_from_zero_and_of_no_number()


@needs_compiler
def test_products_of_another_size_are_refused():
    given, size = problem()
    for products in (given[0][:, :-1], given[0][..., :-9], given[0].double()):
        with pytest.raises(ValueError, match=r"found products .* of a 5×6 map; expected \(B, 30"):
            trained(products, *given[1:], EPS, size)


@needs_compiler
@pytest.mark.parametrize("wrong", [1, 3, 4])
def test_parameters_of_another_size_or_dtype_are_refused(wrong):
    given, size = problem()
    for tensor in (given[wrong][..., :-16], given[wrong].double()):
        with pytest.raises(ValueError, match=r"found .* of a head of 32 channels; expected \(.*\) torch.float"):
            trained(*given[:wrong], tensor, *given[wrong + 1 :], EPS, size)


@needs_compiler
def test_another_default_dtype_changes_nothing():
    given, size = problem(scale=3)
    torch.set_default_dtype(torch.float64)
    try:
        found = trained(*given, EPS, size)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert error(found, in_torch(*doubles(given), EPS, size)) < TOLERANCE


def test_what_the_kernel_takes():
    x, weight, predict = torch.zeros(1, 24, 5, 6), torch.zeros(32, 24, 3, 3), torch.zeros(3, 32, 1, 1)
    assert module.suits(x, weight, predict) is (KERNEL.unavailable() is None)
    assert not module.suits(x.double(), weight, predict)
    assert not module.suits(x, weight[:20], predict[:, :20])
    assert not module.suits(x[:, :20], weight, predict)
    assert not module.suits(x[:0], weight, predict)
    assert not module.suits(x, weight, predict, None)
    assert not module.suits(x, weight, predict, torch.zeros(32).double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not module.suits(x, weight, predict)
