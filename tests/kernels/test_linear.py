"""Linear layers by the C kernel and by torch: the same numbers and gradients, whichever multiplies."""

import pytest
import torch
import torch.nn.functional as F

from pamm.kernels import matrix
from pamm.kernels.matrix import KernelLinear


@pytest.fixture(params=["kernel", "torch"])
def way(request, monkeypatch):
    """Either way of multiplying, for products of any size."""
    monkeypatch.setattr(matrix, "SLOW_PRODUCTS", request.param == "kernel")
    if request.param == "kernel" and matrix.objection():
        pytest.skip("the kernel does not run here")
    for limit in ("SMALLEST", "SMALLEST_WEIGHT", "FEWEST_ROWS"):
        monkeypatch.setattr(matrix, limit, 0)
    return request.param


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def assert_gradients_close(found, expected, inputs, exact):
    direction = torch.randn(found.shape)
    found = torch.autograd.grad(found, inputs, direction)
    for a, b in zip(found, torch.autograd.grad(expected, exact, direction.double()), strict=True):
        close(a, b)


@pytest.mark.parametrize("shape", [(7, 24), (1, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_equals_float64(way, shape, biased):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape, requires_grad=True), torch.randn(9, 24, requires_grad=True), torch.randn(9)
    inputs = [x, weight] + ([bias.requires_grad_()] if biased else [])
    exact = [value.detach().double().requires_grad_() for value in inputs]
    found, expected = matrix.linear(*inputs), F.linear(*exact)
    close(found, expected)
    assert_gradients_close(found, expected, inputs, exact)


@pytest.mark.parametrize("rows", [11, 1])
@pytest.mark.parametrize("biased", [True, False])
def test_batched_linear_equals_float64_for_rows_and_weights_strided_in_memory(way, biased, rows):
    torch.manual_seed(1)
    x = torch.randn(rows, 3, 16).transpose(0, 1).requires_grad_()
    weight = torch.randn(3, 16, 8).mT.requires_grad_()
    inputs = [x, weight] + ([torch.randn(3, 1, 8, requires_grad=True)] if biased else [])
    exact = [value.detach().double().requires_grad_() for value in inputs]
    found = matrix.batched_linear(*inputs)
    expected = exact[0] @ exact[1].mT + (exact[2] if biased else 0)
    close(found, expected)
    assert_gradients_close(found, expected, inputs, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast_are_left_to_torch(way, dtype):
    x, weight = torch.randn(4, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    assert torch.equal(matrix.linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert matrix.linear(x.float(), weight.float()).dtype == torch.bfloat16
        assert matrix.batched_linear(x[None].float(), weight[None].float()).dtype == torch.bfloat16


def test_an_exported_graph_takes_any_number_of_rows(way):
    layer = KernelLinear(8, 4)
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(layer, (torch.randn(5, 8),), dynamic_shapes=({0: rows},))
    torch.testing.assert_close(exported.module()(torch.ones(9, 8)), F.linear(torch.ones(9, 8), *layer.parameters()))
