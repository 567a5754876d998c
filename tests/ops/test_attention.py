"""Softmax attention by the C kernel against torch's in float64, and when it is used."""

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
from torch import Tensor

from pamm.ops import attention as module
from pamm.ops.attention import KERNEL, attention

needs_compiler = pytest.mark.skipif(KERNEL.unavailable() is not None, reason="no C compiler here")


def problem(images=1, heads=3, queries=70, keys=70, width=64, *, dtype=torch.float32, scale=1.0) -> list[Tensor]:
    """q, k and v, (images, heads, tokens, width) each, the heads side by side in memory as a linear layer leaves them."""
    torch.manual_seed(0)
    sizes = (queries, keys, keys)
    return [(scale * torch.randn(images, n, heads, width)).to(dtype).transpose(1, 2) for n in sizes]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double())


CASES = {
    "one token": {"queries": 1, "keys": 1},
    "whole panels": {"queries": 64, "keys": 64},
    "class token": {"images": 2, "heads": 2, "queries": 257, "keys": 257},
    "other keys": {"queries": 33, "keys": 100},
    "odd width": {"images": 2, "width": 41},
    "narrow": {"width": 3},
    "wide": {"width": 130},
    "sharp": {"scale": 8.0},
}


@needs_compiler
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_is_softmax_attention(case, dtype):
    """As near to float64 as torch's own, to the last digits; scores of hundreds ("sharp") cost both of them some."""
    given = problem(**CASES[case], dtype=dtype)
    expected = exact(*given)
    found = torch.ops.pamm.attention(*given)
    assert found.dtype == dtype and found.shape == expected.shape
    torchs = (F.scaled_dot_product_attention(*given) - expected).abs().max()
    digits = 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert (found - expected).abs().max() <= 2 * torchs + digits


@needs_compiler
def test_any_strides():
    q, k, v = problem()
    wide = [torch.stack([x, x + 1], dim=-1)[..., 0] for x in (q, k, v)]  # columns are not side by side
    torch.testing.assert_close(torch.ops.pamm.attention(*wide), torch.ops.pamm.attention(q, k, v), rtol=0, atol=0)


@needs_compiler
def test_same_bits_for_any_number_of_threads():
    given = problem(2, 3, 300, 300)
    assert_same_bits_for_any_number_of_threads(lambda: [torch.ops.pamm.attention(*given)])


@needs_compiler
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_a_number_stays_so(place):
    given = problem()
    given[place].view(torch.int32)[0, 1, 5, 7] = 0x7FC00001  # a NaN that arithmetic on its bits might lose
    found, expected = torch.ops.pamm.attention(*given), exact(*given)
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any() and not found.isnan().all()


@needs_compiler
def test_registration_as_an_operator():
    torch.library.opcheck(torch.ops.pamm.attention.default, tuple(problem()))


@needs_compiler
def test_compiles_to_one_graph():
    chosen = "module.BY_CONVOLUTION, module.SMALLEST = True, 1"
    assert_compiles_to_one_graph("test_attention", "attention(*given) + 1", before=chosen)


@needs_compiler
@needs_x86
@pytest.mark.parametrize("narrower", NARROWER)
def test_kernel_of_older_processors(narrower, tmp_path):
    code = (
        "for case in CASES: test_kernel_is_softmax_attention(case, torch.float32)\n"
        "for place in (0, 1): test_what_is_not_a_number_stays_so(place)"
    )
    freshly_compiled("test_attention", code, narrower, tmp_path)


@pytest.fixture
def operator_calls(monkeypatch) -> list[bool]:
    """As on a processor where the kernel is the faster one, whatever this one is; notes every use of the kernel."""
    monkeypatch.setattr(module, "BY_CONVOLUTION", True)
    monkeypatch.setattr(module, "SMALLEST", 1)
    calls = []

    def note(*tensors: Tensor) -> Tensor:
        calls.append(True)
        return module.kernel_attention(*tensors)

    monkeypatch.setattr(torch.ops.pamm, "attention", note)
    return calls


@needs_compiler
def test_gradients_are_torchs(operator_calls):
    given = [x.requires_grad_() for x in problem()]
    torch.testing.assert_close(attention(*given), F.scaled_dot_product_attention(*given), rtol=0, atol=0)
    attention(*given).sum().backward()
    assert not operator_calls and all(x.grad is not None for x in given)
    with torch.no_grad():
        torch.testing.assert_close(attention(*given), F.scaled_dot_product_attention(*given))
    assert operator_calls


OTHERS = {
    "float64": lambda q, k, v: (q.double(), k.double(), v.double()),
    "another device": lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")),
    "keys for all images": lambda q, k, v: (q, k[:1], v[:1]),
    "three dimensions": lambda q, k, v: (q[0], k[0], v[0]),
    "few queries": lambda q, k, v: (q[:, :, :5], k, v),
    "two dtypes": lambda q, k, v: (q, k.bfloat16(), v),
    "two widths": lambda q, k, v: (q[..., :32], k, v),
}


@needs_compiler
@pytest.mark.parametrize("case", OTHERS)
def test_other_inputs_are_left_to_torch(case, operator_calls):
    given = OTHERS[case](*problem(images=2))
    try:
        expected = F.scaled_dot_product_attention(*given)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)) as told:
            attention(*given)
        assert str(told.value) == str(error)
    else:
        found = attention(*given)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.is_meta or torch.equal(found, expected)
    assert not operator_calls


@pytest.mark.filterwarnings("ignore:`torch.jit")  # tracing is what older exporters do
@needs_compiler
def test_graphs_for_other_machines_and_forward_derivatives_are_torchs(operator_calls):
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v)

    exported = torch.export.export(Layer(), tuple(problem()))
    traced = torch.jit.trace(Layer(), problem(), check_trace=False)
    assert "ops.pamm" not in str(exported.graph) and "pamm::" not in str(traced.inlined_graph)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda q: attention(q, *problem()[1:]), (problem()[0],), (problem()[0],))
    assert not operator_calls
