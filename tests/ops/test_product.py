"""Products as convolutions and by the C kernel: the same numbers and gradients as torch's own, whichever library multiplies."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pamm.ops import matrix, product


@pytest.fixture(params=["kernel", "convolution", "matrix product"])
def way(request, monkeypatch):
    """Every way of multiplying, for products of any size."""
    if request.param == "kernel" and matrix.objection():
        pytest.skip("the kernel does not run here")
    monkeypatch.setattr(product, "BY_CONVOLUTION", request.param != "matrix product")
    monkeypatch.setattr(product, "SMALLEST", 0)
    monkeypatch.setattr(product, "SMALLEST_WEIGHT", 0)
    monkeypatch.setattr(product, "FEWEST_ROWS", 0 if request.param == "kernel" else 1 << 40)
    return request.param


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 24), (1, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_equals_float64(way, shape, biased):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape, requires_grad=True), torch.randn(9, 24, requires_grad=True), torch.randn(9)
    inputs = [x, weight] + ([bias.requires_grad_()] if biased else [])
    exact = [value.detach().double().requires_grad_() for value in inputs]
    found, expected = product.linear(*inputs), F.linear(*exact)
    close(found, expected)
    direction = torch.randn(found.shape)
    found = torch.autograd.grad(found, inputs, direction)
    for a, b in zip(found, torch.autograd.grad(expected, exact, direction.double()), strict=True):
        close(a, b)


@pytest.mark.parametrize("biased", [True, False])
def test_batched_linear_equals_float64_for_rows_and_weights_strided_in_memory(way, biased):
    torch.manual_seed(1)
    x = torch.randn(11, 3, 16).transpose(0, 1).requires_grad_()
    weight = torch.randn(3, 8, 16).mT.requires_grad_()
    inputs = [x, weight] + ([torch.randn(3, 1, 8, requires_grad=True)] if biased else [])
    exact = [value.detach().double().requires_grad_() for value in inputs]
    found = product.batched_linear(*inputs)
    expected = exact[0] @ exact[1] + (exact[2] if biased else 0)
    close(found, expected)
    direction = torch.randn(found.shape)
    found = torch.autograd.grad(found, inputs, direction)
    for a, b in zip(found, torch.autograd.grad(expected, exact, direction.double()), strict=True):
        close(a, b)


def test_adopted_layers_keep_their_parameters_and_names(way):
    model = nn.Sequential(nn.Linear(12, 6), nn.Conv2d(4, 4, 3), nn.Sequential(nn.Linear(6, 2, bias=False)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(5, 12)
    expected = F.linear(F.linear(x, before["0.weight"], before["0.bias"]), before["2.0.weight"])
    product.adopt(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model[2](model[0](x)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast_are_left_to_torch(way, dtype):
    x, weight = torch.randn(4, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    assert torch.equal(product.linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert product.linear(x.float(), weight.float()).dtype == torch.bfloat16
        assert product.batched_linear(x[None].float(), weight.mT[None].float()).dtype == torch.bfloat16


def test_an_exported_graph_holds_products_alone(monkeypatch):
    monkeypatch.setattr(product, "BY_CONVOLUTION", True)
    monkeypatch.setattr(product, "SMALLEST", 0)
    layer = product.Linear(8, 4)
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(layer, (torch.randn(5, 8),), dynamic_shapes=({0: rows},))
    assert not any("conv" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(torch.ones(9, 8)), F.linear(torch.ones(9, 8), *layer.parameters()))


@pytest.mark.parametrize("batch", [1, 2])
def test_channels_last_is_recognised_for_every_batch_size(batch):
    tokens = torch.randn(batch, 13, 6)[:, 1:]
    maps = tokens.transpose(1, 2).unflatten(2, (3, 4))
    found = product.channels_last(maps)
    assert torch.equal(found, maps) and found.stride() == (72, 1, 24, 6)
