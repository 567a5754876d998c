"""Softmax attention by the C kernel and its gradients against torch's in float64, and when it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from pamm.kernels import attention as module
from pamm.kernels.attention import KERNEL, attention

needs_compiler = pytest.mark.skipif(KERNEL.unavailable() is not None, reason="no C compiler here")


def problem(images=1, heads=3, queries=70, keys=70, width=64, *, dtype=torch.float32, scale=1.0) -> list[Tensor]:
    """q, k and v, (images, heads, tokens, width) each, the heads side by side in memory as a linear layer leaves them."""
    torch.manual_seed(0)
    sizes = (queries, keys, keys)
    return [(scale * torch.randn(images, n, heads, width)).to(dtype).transpose(1, 2) for n in sizes]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double())


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.pamm.attention(q, k, v)[0]


FORMS = (ours, F.scaled_dot_product_attention, exact)


def gradients(attend: Callable[..., Tensor], given: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """Of the inputs that require one, all of them where none does."""
    given = [x.detach().requires_grad_(x.requires_grad) for x in given]
    wanted = [x for x in given if x.requires_grad] or [x.requires_grad_() for x in given]
    return torch.autograd.grad(attend(*given), wanted, dy)


def assert_as_near_as_torchs(found: Sequence[Tensor], torchs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """As near to float64 as torch's own, to the last digits of the largest number."""
    largest = max(right.abs().max() for right in expected)
    for own, other, right in zip(found, torchs, expected, strict=True):
        assert own.dtype == other.dtype and own.shape == right.shape
        digits = 4 * torch.finfo(own.dtype).eps * largest
        assert (own - right).abs().max() <= 2 * (other - right).abs().max() + digits


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
    """Scores of hundreds ("sharp") cost torch's and the kernel some digits."""
    given = problem(**CASES[case], dtype=dtype)
    assert_as_near_as_torchs(*([form(*given)] for form in FORMS))


@needs_compiler
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_softmax_attention(case, dtype):
    given = problem(**CASES[case], dtype=dtype)
    dy = torch.randn_like(given[0])
    assert_as_near_as_torchs(*(gradients(form, given, dy.to(form(*given))) for form in FORMS))


@needs_compiler
@pytest.mark.parametrize("wanted", range(3))
def test_one_gradient_alone(wanted):
    given = problem()
    given[wanted].requires_grad_()
    dy = torch.randn_like(given[0])
    torch.testing.assert_close(gradients(ours, given, dy), gradients(exact, given, dy.double()), check_dtype=False)


@needs_compiler
def test_any_strides():
    """Columns that are not side by side; one linear layer's output, as in a transformer; a gradient that is a single number."""
    given = problem()
    expected, dy = ours(*given), torch.randn_like(given[0])
    wide = [torch.stack([x, x + 1], dim=-1)[..., 0] for x in given]
    joined = torch.stack([x.transpose(1, 2) for x in given], dim=2).permute(2, 0, 3, 1, 4).unbind()
    for other in (wide, joined):
        assert torch.equal(ours(*other), expected)
        for direction in (dy, dy.contiguous(), torch.stack([dy, dy], dim=-1)[..., 1]):
            assert all(map(torch.equal, gradients(ours, other, direction), gradients(ours, given, dy)))
    one = torch.ones(()).expand_as(expected)
    assert all(map(torch.equal, gradients(ours, given, one), gradients(ours, given, one.contiguous())))


@needs_compiler
@pytest.mark.parametrize(("images", "heads"), [(2, 3), (1, 1)])
def test_same_bits_for_any_number_of_threads(images, heads):
    """Also where there are fewer heads than threads, which then share the work on a head."""
    given = [x.requires_grad_() for x in problem(images, heads, 300, 310)]

    def step() -> list[Tensor]:
        y = ours(*given)
        return [y, *torch.autograd.grad(y.square().sum(), given)]

    assert_same_bits_for_any_number_of_threads(step)


@needs_compiler
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_a_number_stays_so(place):
    given = problem()
    given[place].view(torch.int32)[0, 1, 5, 7] = 0x7FC00001  # a NaN that arithmetic on its bits might lose
    found, expected = ours(*given), exact(*given)
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any() and not found.isnan().all()


@needs_compiler
def test_gradients_of_what_is_not_a_number_are_none():
    given = problem()
    given[1][0, 1, 5] = torch.nan
    for found in gradients(ours, given, torch.randn_like(given[0])):
        assert found[0, 1].isnan().all() and found[0, [0, 2]].isfinite().all()


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own checker's
def test_registration_as_an_operator():
    given = problem()
    torch.library.opcheck(torch.ops.pamm.attention.default, tuple(x.requires_grad_() for x in given))
    given = [x.detach() for x in given]
    kept = torch.ops.pamm.attention(*given)
    torch.library.opcheck(torch.ops.pamm.attention_backward.default, (torch.randn_like(kept[0]), *given, *kept))


@pytest.fixture
def chosen(monkeypatch) -> None:
    """The kernel is taken whatever the processor and the size."""
    monkeypatch.setattr(module.matrix, "SLOW_PRODUCTS", True)
    monkeypatch.setattr(module, "SMALLEST", 1)


@needs_compiler
def test_compiles_to_one_graph(chosen, tmp_path):
    given = problem()
    assert_compiles_to_one_graph(lambda: attention(*given) + 1, module, tmp_path)


@needs_compiler
def test_gradients_of_one_compiled_graph(chosen, tmp_path):
    given = problem()
    torch._dynamo.reset()
    with not_yet_loaded(module, tmp_path):
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        found, expected = (gradients(form, given, torch.ones_like(given[0])) for form in (compiled, attention))
        assert all(map(torch.equal, found, expected))


@needs_compiler
@needs_x86
@pytest.mark.parametrize("narrower", NARROWER)
def test_kernel_of_older_processors(narrower, tmp_path):
    with not_yet_loaded(module, tmp_path, narrower):
        for case in CASES:
            test_kernel_is_softmax_attention(case, torch.float32)
            test_gradients_are_those_of_softmax_attention(case, torch.float32)
        for place in (0, 1):
            test_what_is_not_a_number_stays_so(place)


@pytest.fixture
def operator_calls(chosen, monkeypatch) -> list[bool]:
    """Notes every use of the kernel."""
    calls = []

    def note(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(True)
        return module.kernel_attention(*tensors)

    monkeypatch.setattr(torch.ops.pamm, "attention", note)
    return calls


@needs_compiler
def test_used_with_gradients_and_without(operator_calls):
    given = problem()
    with torch.no_grad():
        torch.testing.assert_close(attention(*given), F.scaled_dot_product_attention(*given))
    dy = torch.randn_like(given[0])
    found, torchs = (gradients(form, given, dy) for form in (attention, F.scaled_dot_product_attention))
    torch.testing.assert_close(found, torchs)
    assert len(operator_calls) == 2


@needs_compiler
def test_gradients_of_gradients():
    """Torch's attention has none on a CPU; here they are those of its plain form."""
    given, (dy, *others) = problem(), torch.randn(4, 1, 3, 70, 64)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q.double() @ k.double().mT / 8, -1) @ v.double()

    def second(attend) -> list[Tensor]:
        parts = [x.clone().requires_grad_() for x in given]
        direction = dy.clone().requires_grad_()
        first = torch.autograd.grad(attend(*parts), parts, direction.to(attend(*parts)), create_graph=True)
        weighted = sum((x * other).sum() for x, other in zip(first, others, strict=True))
        return [*first, *torch.autograd.grad(weighted, [direction, *parts])]

    torch.testing.assert_close(second(ours), second(plain), rtol=1e-4, atol=1e-5, check_dtype=False)


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


@needs_compiler
def test_the_operators_refuse_what_they_would_read_wrongly():
    q, k, v = problem()
    y, rows = torch.ops.pamm.attention(q, k, v)
    for given in ((q, k[:, :, 1:], v), (q, k, v.bfloat16()), (q[..., 1:], k, v), (q.double(), k.double(), v.double())):
        with pytest.raises(ValueError, match="all float32 or all bfloat16"):
            torch.ops.pamm.attention(*given)
    for dy, kept in ((y[:, :, 1:], rows), (y.double(), rows), (y, rows[..., :1])):
        with pytest.raises(ValueError, match="rows as the forward pass returned them"):
            torch.ops.pamm.attention_backward(dy, q, k, v, y, kept)
