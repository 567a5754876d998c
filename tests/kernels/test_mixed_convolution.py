"""Convolutions with kernels mixed for one image against torch's convolution in float64."""

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
from pamm.kernels import mixed_convolution as module
from pamm.kernels.mixed_convolution import KERNEL, mixed_convolution

needs_compiler = pytest.mark.skipif(KERNEL.unavailable() is not None, reason="no C compiler here")

CASES = {
    "one position": {"height": 1, "width": 1},
    "one square": {"height": 8, "width": 8},
    "odd": {"height": 13, "width": 10, "channels": 37, "outputs": 5},
    "many squares": {"height": 41, "width": 17, "channels": 16, "outputs": 16},
    "many outputs": {"height": 9, "width": 30, "channels": 20, "outputs": 67},
}


def problem(height=12, width=20, channels=33, outputs=16, parts=(6, 2), taps=9) -> tuple:
    """x, base, parts and weights; one part has no weight, as that of an expert that is not chosen."""
    torch.manual_seed(0)
    kernels = [torch.randn(count, channels, taps, taps) for count in (outputs, *parts)]
    weights = torch.randn(outputs, sum(parts))
    weights[:, 1] = 0
    return torch.randn(height, width, channels), kernels[0], kernels[1:], weights


def exact(x: Tensor, base: Tensor, parts: list[Tensor], weights: Tensor) -> Tensor:
    kernel = base.double() + torch.einsum("nj,jcyx->ncyx", weights.double(), torch.cat(parts).double())
    image = x.double().permute(2, 0, 1)[None]
    return F.conv2d(image, kernel, padding=base.shape[-1] // 2)[0].permute(1, 2, 0)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_kernel_is_a_convolution_with_the_sum(case):
    given = problem(**CASES[case])
    found = torch.ops.pamm.mixed_convolution(*given)
    assert found.dtype == torch.float32 and error(found, exact(*given)) < 2e-6


@needs_compiler
def test_bfloat16_images_and_weights_are_taken_as_they_are():
    x, base, parts, weights = problem()
    given = x.bfloat16(), base.bfloat16(), [part.bfloat16() for part in parts], weights
    assert error(torch.ops.pamm.mixed_convolution(*given), exact(*given)) < 2e-6


@needs_compiler
def test_any_strides():
    x, *others = problem()
    expected = torch.ops.pamm.mixed_convolution(x, *others)
    for memory in (x.permute(2, 0, 1).contiguous().permute(1, 2, 0), x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(torch.ops.pamm.mixed_convolution(memory, *others), expected)


@needs_compiler
def test_parts_without_a_weight_are_not_read():
    x, base, parts, weights = problem()
    expected = torch.ops.pamm.mixed_convolution(x, base, parts, weights)
    parts[0][1] = torch.nan
    assert torch.equal(torch.ops.pamm.mixed_convolution(x, base, parts, weights), expected)
    alone = torch.ops.pamm.mixed_convolution(x, base, parts, torch.zeros_like(weights))
    assert error(alone, F.conv2d(x.permute(2, 0, 1)[None], base, padding=4)[0].permute(1, 2, 0)) < 2e-6


@needs_compiler
def test_same_bits_for_any_number_of_threads():
    given = problem()
    assert_same_bits_for_any_number_of_threads(lambda: [torch.ops.pamm.mixed_convolution(*given)])


@needs_compiler
def test_registration_as_an_operator():
    torch.library.opcheck(torch.ops.pamm.mixed_convolution.default, problem())


def test_mistakes_are_told():
    x, base, parts, weights = problem()
    wrong = (x[..., 1:], weights), (x, weights[:, 1:]), (x, weights[1:]), (x[:0], weights)
    for x, weights in wrong:
        with pytest.raises(RuntimeError):
            mixed_convolution(x, base, parts, weights)


@pytest.mark.parametrize("taps", [1, 5, 9])
def test_torchs_form_is_the_same(taps, monkeypatch):
    """What runs for other kernels, on other devices and without a compiler."""
    monkeypatch.setattr(module, "_suits", lambda *given: False)
    given = problem(taps=taps)
    assert error(mixed_convolution(*given), exact(*given)) < 2e-6
    x, base, parts, weights = given
    low = x.bfloat16(), base.bfloat16(), [part.bfloat16() for part in parts], weights
    assert error(mixed_convolution(*low), exact(*given)) < 2e-2


@needs_compiler
def test_compiles_to_one_graph(tmp_path):
    given = problem()
    assert_compiles_to_one_graph(lambda: mixed_convolution(*given) + 1, module, tmp_path)


@needs_compiler
@needs_x86
@pytest.mark.parametrize("narrower", NARROWER)
def test_kernel_of_older_processors(narrower, tmp_path):
    with not_yet_loaded(module, tmp_path, narrower):
        for case in CASES:
            test_kernel_is_a_convolution_with_the_sum(case)
