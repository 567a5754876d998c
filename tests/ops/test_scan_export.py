"""The scan in exported models, and through mamba-ssm's function."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from test_selective_scan import CASES, FLOAT32_TOLERANCE, NAMES, assert_close, in_double, problem, run

from pamm.ops.selective_scan import choose, mamba_ssm, selective_scan
from pamm.ops.selective_scan.inputs import Inputs


class Scan(torch.nn.Module):
    """A module that holds its orders and leaves the engine to choose itself."""

    def __init__(self, orders):
        super().__init__()
        self.register_buffer("orders", orders)

    def forward(self, x, delta, A, B, C, D, delta_bias):
        return selective_scan(x, delta, A, B, C, D, self.orders, delta_bias=delta_bias)


def exported(size, per_order, strict):
    inputs, orders = problem(1, 2, 3, size, 5, 4, per_order=per_order)
    tensors = tuple(inputs[name].detach() for name in NAMES)
    program = torch.export.export(Scan(orders), tensors, strict=strict)
    expected = selective_scan(**inputs, orders=orders, engine="reference").detach()
    assert_close({"y": program.module()(*tensors)}, {"y": expected}, FLOAT32_TOLERANCE)
    return [node for m in program.graph_module.modules() if hasattr(m, "graph") for node in m.graph.nodes]


@pytest.mark.parametrize(("per_order", "strict"), [(False, False), (True, True)], ids=["shared", "per-order-strict"])
def test_exported_graph_gives_the_reference_and_does_not_grow_with_the_sequence(per_order, strict):
    short, long = (exported(size, per_order, strict) for size in ((3, 5), (20, 21)))
    assert len(short) == len(long) < 200
    assert not any("pamm" in str(node.target) for node in long)


def test_export_form_is_chosen_only_while_exporting():
    assert choose("cpu", torch.float32) != "chunked"


def published_recurrence(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The recurrence with the arguments of mamba-ssm's `selective_scan_fn`: u and delta (batch, channels, L), A (channels,
    N), B and C (batch, groups, N, L) with neighbouring channels in one group, D and delta_bias (channels)."""
    assert u.dtype == delta.dtype == B.dtype == C.dtype and A.dtype == D.dtype == torch.float32
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    B, C = (values.repeat_interleave(u.shape[1] // values.shape[1], dim=1) for values in (B, C))
    h, outputs = 0, []
    for t in range(u.shape[2]):
        h = (step[:, :, t, None] * A).exp() * h + (step * u)[:, :, t, None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1) + D * u[:, :, t])
    return torch.stack(outputs, -1)


@pytest.mark.parametrize("case", ["typical", "odd", "one-order"])
@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per-order"])
def test_layout_given_to_mamba_ssm(per_order, case, monkeypatch):
    """mamba-ssm runs on GPUs alone; here a function with its arguments stands in for its kernel."""
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = published_recurrence
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    inputs, orders = problem(**CASES[case], per_order=per_order)
    expected = run(in_double(inputs), orders, "reference")
    tensors = list(inputs.values())
    y = mamba_ssm.selective_scan(Inputs(*tensors, orders, True))
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    gradients = torch.autograd.grad((y * weight).sum(), tensors)
    found = {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(inputs, gradients, strict=True)}}
    assert_close(found, expected, FLOAT32_TOLERANCE)


def test_mamba_ssm_says_why_it_does_not_run():
    inputs, orders = problem(**CASES["odd"])
    with pytest.raises(ValueError, match=r"scan engine 'mamba_ssm' cannot run this: .*(GPU|import)"):
        selective_scan(**inputs, orders=orders, engine="mamba_ssm")
    assert "float64" in mamba_ssm.refuses("cuda", torch.float64)


@pytest.mark.gpu
@pytest.mark.skipif(mamba_ssm.unavailable() is not None, reason=str(mamba_ssm.unavailable()))
@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per-order"])
def test_mamba_ssm_equals_reference(per_order):
    inputs, orders = problem(**CASES["long"], per_order=per_order)
    expected = run(in_double(inputs), orders, "reference")
    on_gpu = {name: value.detach().cuda().requires_grad_() for name, value in inputs.items()}
    found = run(on_gpu, orders, "mamba_ssm")
    assert_close({name: value.cpu() for name, value in found.items()}, expected, FLOAT32_TOLERANCE)
