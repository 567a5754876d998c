"""Products by the C kernel against float64, for every layout of their operands, and what training does with their gradients."""

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
from pamm.kernels import matrix
from pamm.kernels.matrix import KERNEL, KernelLinear, KernelTaskLinear

needs_compiler = pytest.mark.skipif(KERNEL.unavailable() is not None, reason="no C compiler here")
TOLERANCE = 2e-6
"""Largest error, relative to the largest number of the result."""

CASES = {
    "one number": (1, 1, 1, 1),
    "one row": (1, 1, 50, 70),
    "whole panels": (2, 24, 32, 64),
    "odd": (3, 13, 37, 41),
    "narrow": (1, 200, 33, 16),
    "several terms of a sum at a time": (1, 29, 1025, 33),
    "several blocks": (2, 100, 64, 1000),
    "many rows": (1, 1030, 48, 60),
    "a short sum": (1, 70, 3, 90),
}
"""Batch, rows, terms of a sum, columns."""


def as_it_is(matrices: Tensor) -> Tensor:
    return matrices


def turned(matrices: Tensor) -> Tensor:
    return matrices.mT.contiguous().mT


def spread(matrices: Tensor) -> Tensor:
    return matrices.repeat_interleave(2, dim=2)[..., ::2]


def a_part(matrices: Tensor) -> Tensor:
    return F.pad(matrices, (3, 2, 1, 4))[:, 1:-4, 3:-2]


LAYOUTS = [as_it_is, turned, spread, a_part]


def problem(batch=2, rows=19, depth=45, columns=35) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, rows, depth), torch.randn(batch, depth, columns), torch.randn(batch, columns)


def exact(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    y = a.double() @ b.double()
    return y if bias is None else y + bias.double()[:, None]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_kernel_is_the_product(case):
    a, b, bias = problem(*CASES[case])
    for added in (bias, None):
        found = torch.ops.pamm.product(a, b, added, False)
        assert found.is_contiguous() and error(found, exact(a, b, added)) < TOLERANCE
    found = torch.ops.pamm.product(a, b, None, True)
    assert found.mT.is_contiguous() and error(found, exact(a, b, None)) < TOLERANCE


@needs_compiler
@pytest.mark.parametrize("lay_a", LAYOUTS)
@pytest.mark.parametrize("lay_b", LAYOUTS)
def test_any_layout_gives_the_same_bits_and_gradients(lay_a, lay_b):
    a, b, bias = problem()
    expected = torch.ops.pamm.product(a, b, bias, False)
    given = [lay_a(a).requires_grad_(), lay_b(b).requires_grad_(), bias.requires_grad_()]
    y = torch.ops.pamm.product(*given, False)
    assert torch.equal(y, expected)
    direction = torch.randn(y.shape)
    for dy in (direction, turned(direction), direction[:, :1].expand_as(y)):
        found = torch.autograd.grad(y, given, dy, retain_graph=True)
        for ours, right in zip(found, torch.autograd.grad(exact(*given), given, dy.double()), strict=True):
            assert ours.shape == right.shape and error(ours, right) < TOLERANCE


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_products(case):
    given = [tensor.requires_grad_() for tensor in problem(*CASES[case])]
    y = torch.ops.pamm.product(*given, False)
    direction = torch.randn(y.shape)
    found = torch.autograd.grad(y, given, direction)
    for ours, right in zip(found, torch.autograd.grad(exact(*given), given, direction.double()), strict=True):
        assert ours.shape == right.shape and error(ours, right) < TOLERANCE


@needs_compiler
@pytest.mark.parametrize("empty", range(4))
def test_empty_operands(empty):
    sizes = [2, 3, 4, 5]
    sizes[empty] = 0
    a, b, bias = problem(*sizes)
    assert torch.equal(torch.ops.pamm.product(a, b, bias, False), torch.baddbmm(bias[:, None], a, b))
    assert torch.equal(torch.ops.pamm.product(a, b, None, True), a @ b)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_row_and_column_alone(value):
    a, b, bias = problem()
    a[0, 3, 7] = b[1, 5, 20] = value
    y = torch.ops.pamm.product(a, b, bias, False)
    expected = a @ b + bias[:, None]
    assert torch.equal(y.isfinite(), expected.isfinite()) and torch.equal(y.isnan(), expected.isnan())


@needs_compiler
def test_same_bits_for_any_number_of_threads():
    given = [tensor.requires_grad_() for tensor in problem(3, 700, 500, 900)]

    def step() -> list[Tensor]:
        y = torch.ops.pamm.product(*given, False)
        return [y, *torch.autograd.grad(y.square().sum(), given)]

    assert_same_bits_for_any_number_of_threads(step)


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own checker's
def test_registration_as_an_operator():
    a, b, bias = (tensor.requires_grad_() for tensor in problem())
    torch.library.opcheck(torch.ops.pamm.product.default, (a, b, bias, False))
    torch.library.opcheck(torch.ops.pamm.product.default, (a, turned(b.detach()).requires_grad_(), None, True))


@needs_compiler
@needs_x86
@pytest.mark.parametrize("narrower", NARROWER)
def test_kernel_of_older_processors(narrower, tmp_path):
    with not_yet_loaded(matrix, tmp_path, narrower):
        for case in CASES:
            test_kernel_is_the_product(case)
            test_gradients_are_the_products(case)
        test_any_layout_gives_the_same_bits_and_gradients(turned, turned)
        test_what_is_not_finite_reaches_its_row_and_column_alone(float("nan"))


@needs_compiler
def test_the_operator_refuses_what_it_would_read_wrongly():
    a, b, bias = problem()
    for given in (
        (a[..., 1:], b, None, False),
        (a, b.double(), None, False),
        (a, b, bias[:1], False),
        (a, b, bias, True),
    ):
        with pytest.raises(ValueError, match=r"expected \(T, n, i\), \(T, i, o\) and a bias"):
            torch.ops.pamm.product(*given)


# -- the layers that use it ----------------------------------------------------------------------------------------------


@pytest.fixture
def used(monkeypatch):
    """Products of any size run by the kernel."""
    monkeypatch.setattr(matrix, "SLOW_PRODUCTS", True)
    if matrix.objection():
        pytest.skip("the kernel does not run here")
    monkeypatch.setattr(matrix, "SMALLEST", 0)
    monkeypatch.setattr(matrix, "SMALLEST_WEIGHT", 0)


def layer_and_input(kind: str) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind == "task":
        return KernelTaskLinear(3, 64, 48), torch.randn(3, 2, 4, 5, 64, requires_grad=True)
    return KernelLinear(64, 48), torch.randn(2, 40, 64, requires_grad=True)


@pytest.mark.parametrize("kind", ["one", "task"])
def test_a_layer_in_training_is_torchs(used, kind):
    layer, x = layer_and_input(kind)
    flat = x.detach().flatten(1, -2) if kind == "task" else x.detach()
    plain = [tensor.detach().double().requires_grad_() for tensor in (flat, layer.weight, layer.bias)]
    expected = plain[0] @ plain[1].mT + plain[2]
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.view(expected.shape).double())
    assert error(y.view(expected.shape), expected) < 1e-5
    for found, exact in zip((x, layer.weight, layer.bias), plain, strict=True):
        assert error(found.grad.view(exact.shape), exact.grad) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_single_rows_products(bias):
    torch.manual_seed(0)
    layer, x = KernelTaskLinear(3, 64, 48, bias=bias), torch.randn(3, 1, 64)
    y = layer(x)
    y.backward(dy := torch.randn(y.shape))
    torch.testing.assert_close(y, x @ layer.weight.mT + (layer.bias if bias else 0))
    torch.testing.assert_close(layer.weight.grad, dy.mT @ x)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch's own use
@pytest.mark.parametrize("kind", ["one", "task"])
def test_derivatives_of_other_kinds_are_torchs(used, kind):
    """Second derivatives, forward mode, torch.func."""
    layer, x = layer_and_input(kind)

    def slope(f, x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(f(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    def torchs(x: Tensor) -> Tensor:
        flat = x.flatten(1, -2) if kind == "task" else x
        return (flat @ layer.weight.mT + layer.bias).view(*x.shape[:-1], -1)

    assert error(slope(layer, x), slope(torchs, x)) < 1e-5
    x = x.detach()
    for derive in (
        lambda f: torch.func.jvp(f, (x,), (x,))[1],
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
    ):
        torch.testing.assert_close(derive(layer), derive(torchs), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_compiles_to_one_graph(used, monkeypatch, tmp_path):
    monkeypatch.setattr(matrix, "FEWEST_ROWS", 1)
    a, b, bias = problem()
    assert_compiles_to_one_graph(lambda: matrix.batched_linear(a, b.mT, bias[:, None]) + 1, matrix, tmp_path)


@pytest.mark.parametrize("kind", ["one", "task"])
def test_graphs_for_other_machines_hold_torchs_products(used, kind):
    layer, x = layer_and_input(kind)
    assert "ops.pamm" not in str(torch.export.export(layer, (x,)).graph)


def test_mistakes_get_torchs_message(used):
    x, weight = torch.randn(40, 64), torch.randn(48, 64)
    for given in ((x[:, 1:], weight, None), (x, weight, torch.randn(3)), (x, weight, torch.randn(48).double())):
        with pytest.raises(RuntimeError) as torchs:
            F.linear(*given)
        with pytest.raises(RuntimeError) as ours:
            matrix.linear(*given)
        assert str(ours.value) == str(torchs.value)
