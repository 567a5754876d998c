"""The selective scan: engines against the reference, outputs and every gradient; the reference against algebra."""

import numpy as np
import pytest
import torch
from torch import Tensor

from c_kernels import (
    NARROWER,
    assert_same_bits_for_any_number_of_threads,
    needs_x86,
    not_yet_loaded,
)
from pamm.nn.serialize import row_column_orders, scan_orders
from pamm.ops.selective_scan import ENGINES, choose, explain, native, selective_scan
from pamm.ops.selective_scan.inputs import Inputs

FLOAT32_TOLERANCE = 2e-5
"""Largest error of a float32 engine, relative to the largest value of the float64 reference's tensor."""
BFLOAT16_TOLERANCE = 1e-2
"""The same where outputs and gradients are rounded to bfloat16 (8 bits)."""
FLOAT64_TOLERANCE = 1e-12

NAMES = ("x", "delta", "A", "B", "C", "D", "delta_bias")
RUNNING = [name for name, e in ENGINES.items() if e.unavailable() is None and e.refuses("cpu", torch.float32) is None]

CASES = {
    "typical": {"G": 2, "images": 2, "K": 4, "size": (4, 6), "channels": 20, "N": 16},
    "odd": {"G": 1, "images": 3, "K": 3, "size": (5, 3), "channels": 7, "N": 5},
    "one-state": {"G": 3, "images": 1, "K": 2, "size": (3, 3), "channels": 16, "N": 1},
    "one-position": {"G": 2, "images": 2, "K": 4, "size": (1, 1), "channels": 4, "N": 8},
    "one-order": {"G": 1, "images": 1, "K": 1, "size": (7, 11), "channels": 33, "N": 9},
    "eight-orders": {"G": 2, "images": 1, "K": 8, "size": (6, 5), "channels": 17, "N": 24},
    "long": {"G": 1, "images": 1, "K": 4, "size": (13, 17), "channels": 40, "N": 16},
}


def problem(G, images, K, size, channels, N, *, per_order=False, dtype=torch.float32, seed=0):
    """Random inputs with realistic Δ and A; leaves that require gradients, and the orders."""
    generator = torch.Generator().manual_seed(seed)
    length, lead = size[0] * size[1], (K,) if per_order else ()

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": normal(G, images, length, channels),
        "delta": normal(G, images, *lead, length, channels),
        "A": -(1 + torch.arange(N, dtype=torch.float64)) * (0.2 * normal(G, *lead, channels, N)).exp(),
        "B": normal(G, images, *lead, length, N),
        "C": normal(G, images, *lead, length, N),
        "D": normal(G, *lead, channels),
        "delta_bias": normal(G, *lead, channels) - 3,
    }
    leaves = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    return leaves, scan_orders("hilbert", *size, K)


def run(inputs, orders, engine, **options):
    """Output and the gradient of every input, for a fixed random weighting of the output."""
    y = selective_scan(**inputs, orders=orders, engine=engine, **options)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    gradients = torch.autograd.grad((y * weight).sum(), list(inputs.values()))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(inputs, gradients, strict=True)}}


def in_double(inputs):
    return {name: value.detach().double().requires_grad_() for name, value in inputs.items()}


def assert_close(found, expected, tolerance):
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error = (found[name].double() - value.double()).abs().max() / value.double().abs().max().clamp_min(1e-30)
        assert error < tolerance, f"{name}: relative error {error:.1e}, allowed {tolerance:.0e}"


# -- the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per-order"])
def test_reference_equals_the_dense_matrix_form(per_order):
    """y_i = Σ_{j ≤ i} C_i·(exp(A Σ_{j < l ≤ i} Δ_l) ⊙ B_j) Δ_j x_j + D x_i along every order, written with numpy."""
    inputs, orders = problem(2, 2, 3, (3, 4), 3, 4, per_order=per_order, dtype=torch.float64)
    v = {name: value.detach().numpy() for name, value in inputs.items()}
    expected = np.zeros_like(v["x"])
    for g, b, k, d in np.ndindex(2, 2, 3, 3):
        order = orders[k].numpy()
        own = {name: value[g] for name, value in v.items()}
        if per_order:
            own |= {name: own[name][:, k] for name in ("delta", "B", "C")}
            own |= {name: own[name][k] for name in ("A", "D", "delta_bias")}
        delta = np.logaddexp(0, own["delta"][b][order, d] + own["delta_bias"][d])
        elapsed = np.subtract.outer(delta.cumsum(), delta.cumsum())
        decay = np.exp(elapsed[..., None] * own["A"][d])
        B, C = (own[name][b][order] for name in "BC")
        matrix = np.tril(np.einsum("in,ijn,jn->ij", C, decay, B)) * delta
        sequence = v["x"][g, b, order, d]
        expected[g, b, order, d] += matrix @ sequence + own["D"][d] * sequence
    found = selective_scan(**inputs, orders=orders, engine="reference")
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", ["reference", "step"])
@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per-order"])
def test_gradients_equal_finite_differences(engine, per_order):
    inputs, orders = problem(2, 1, 2, (2, 3), 3, 2, per_order=per_order, dtype=torch.float64)

    def function(*values):
        return selective_scan(**dict(zip(NAMES, values, strict=True)), orders=orders, engine=engine)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


# -- every engine against the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per-order"])
@pytest.mark.parametrize("engine", RUNNING)
def test_engine_equals_reference(engine, per_order, case):
    inputs, orders = problem(**CASES[case], per_order=per_order)
    expected = run(in_double(inputs), orders, "reference")
    assert_close(run(inputs, orders, engine), expected, FLOAT32_TOLERANCE)
    with torch.no_grad():
        y = selective_scan(**inputs, orders=orders, engine=engine)
    assert_close({"y": y}, {"y": expected["y"]}, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per-order"])
def test_step_engine_is_exact_in_double(per_order):
    inputs, orders = problem(**CASES["odd"], per_order=per_order, dtype=torch.float64)
    assert_close(run(inputs, orders, "step"), run(inputs, orders, "reference"), FLOAT64_TOLERANCE)


@pytest.mark.parametrize("options", [{"softplus": False}, {"softplus": True}], ids=["plain", "softplus"])
@pytest.mark.parametrize("engine", RUNNING)
def test_without_bias(engine, options):
    inputs, orders = problem(**CASES["odd"])
    del inputs["delta_bias"]
    inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()
    expected = run(in_double(inputs), orders, "reference", **options)
    assert_close(run(inputs, orders, engine, **options), expected, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per-order"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", RUNNING)
def test_inputs_of_16_bits_keep_float32_states(engine, dtype, per_order):
    inputs, orders = problem(**CASES["long"], dtype=dtype, per_order=per_order)
    found = run(inputs, orders, engine)
    assert all(value.dtype == dtype for value in found.values())
    assert_close(found, run(in_double(inputs), orders, "reference"), BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("engine", RUNNING)
def test_bfloat16_activations_with_float32_parameters(engine):
    """Under autocast x and delta are narrow and the parameters are not; channels fill no whole number of vectors."""
    inputs, orders = problem(2, 2, 3, (4, 5), 37, 5)
    for name in ("x", "delta"):
        inputs[name] = inputs[name].detach().bfloat16().requires_grad_()
    found, expected = run(inputs, orders, engine), run(in_double(inputs), orders, "reference")
    narrow = {name: value.dtype == torch.bfloat16 for name, value in found.items()}
    assert narrow == {name: name in ("y", "dx", "ddelta") for name in found}
    assert_close(found, expected, BFLOAT16_TOLERANCE)


@pytest.mark.parametrize(("low", "high"), [(-80, -60), (-50, -45), (-20, -10), (-1, 1), (10, 50)])
@pytest.mark.parametrize("engine", RUNNING)
def test_softplus_is_accurate_for_any_argument(engine, low, high):
    """Without the skip every value of y is proportional to Δ: tiny ones must be as accurate as large ones."""
    inputs, orders = problem(**CASES["typical"])
    generator = torch.Generator().manual_seed(3)
    delta = low + (high - low) * torch.rand(inputs["delta"].shape, generator=generator)
    nothing = {name: torch.zeros_like(inputs[name]).requires_grad_() for name in ("D", "delta_bias")}
    inputs |= {"delta": delta.requires_grad_(), **nothing}
    assert_close(run(inputs, orders, engine), run(in_double(inputs), orders, "reference"), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("engine", [*RUNNING, "reference"])
def test_autocast_changes_nothing(engine):
    inputs, orders = problem(**CASES["typical"])
    plain = run(inputs, orders, engine)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(inputs, orders, engine)
    for name, value in plain.items():
        assert torch.equal(cast[name], value), name


@pytest.mark.parametrize("engine", RUNNING)
def test_inputs_of_any_strides(engine):
    inputs, orders = problem(**CASES["odd"])
    expected = run(in_double(inputs), orders, "reference")
    strided = {name: value.detach().mT.contiguous().mT.requires_grad_() for name, value in inputs.items()}
    assert not strided["x"].is_contiguous()
    assert_close(run(strided, orders.T.contiguous().T, engine), expected, FLOAT32_TOLERANCE)
    one = inputs["x"].detach()[:1, :1, :, :1].expand_as(inputs["x"])
    y = selective_scan(**{**inputs, "x": one}, orders=orders, engine=engine)
    y_dense = selective_scan(**{**inputs, "x": one.contiguous()}, orders=orders, engine=engine)
    assert torch.equal(y, y_dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per-order"])
@pytest.mark.parametrize("engine", RUNNING)
def test_inputs_side_by_side_in_a_wider_matrix(engine, per_order, dtype):
    """As one projection makes them: the same bits as from tensors of their own."""
    inputs, orders = problem(**CASES["odd"], per_order=per_order)
    values = {name: tensor.detach() for name, tensor in inputs.items()}
    for name in ("x", "delta"):
        values[name] = values[name].to(dtype)
    for name in ("x", "delta", "B", "C"):
        tensor = values[name]
        values[name] = torch.cat([tensor, tensor, tensor], -1)[..., tensor.shape[-1] : 2 * tensor.shape[-1]]
        assert not values[name].is_contiguous()
    dense = {name: tensor.contiguous().requires_grad_() for name, tensor in values.items()}
    strided = {name: tensor.requires_grad_() for name, tensor in values.items()}
    found, expected = run(strided, orders, engine), run(dense, orders, engine)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per-order"])
@pytest.mark.parametrize("engine", RUNNING)
def test_extreme_steps_and_decays(engine, per_order):
    """Δ up to 20 and A down to −64: decays from 1 to e^−1280."""
    inputs, orders = problem(2, 1, 4, (9, 7), 18, 16, per_order=per_order)
    generator = torch.Generator().manual_seed(2)
    delta = 20 * torch.rand(inputs["delta"].shape, generator=generator) ** 8
    A = -64 * torch.rand(inputs["A"].shape, generator=generator)
    inputs |= {"delta": delta.requires_grad_(), "A": A.requires_grad_()}
    del inputs["delta_bias"]
    found = run(inputs, orders, engine, softplus=False)
    assert all(value.isfinite().all() for value in found.values())
    assert_close(found, run(in_double(inputs), orders, "reference", softplus=False), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("engine", RUNNING)
def test_slow_decays_add_up_no_more_than_rounding(engine):
    """A constant input settles at 1 / (1 - decay): there an error of the exponential is divided by 1 - decay.

    A form with an exponential of 2e-7 exceeds torch's own rounding by half.
    """
    delta = torch.linspace(0.008, 0.1, 80).expand(1, 1, 900, 80)
    ones = torch.ones(1, 1, 900, 1)
    inputs = {"x": torch.ones_like(delta), "delta": delta, "A": -torch.ones(1, 80, 1), "B": ones, "C": ones}
    inputs["D"] = torch.zeros(1, 80)
    orders = scan_orders("hilbert", 30, 30, 2)
    expected = selective_scan(**in_double(inputs), orders=orders, softplus=False, engine="reference").detach()

    def error(engine: str) -> float:
        y = selective_scan(**inputs, orders=orders, softplus=False, engine=engine)
        return ((y.double() - expected) / expected).abs().max().item()

    assert error(engine) < 1.4 * error("reference") < 1e-5


@pytest.mark.parametrize("name", ["x", "delta", "A", "B", "C"])
@pytest.mark.parametrize("engine", RUNNING)
def test_a_nan_is_never_hidden(engine, name):
    inputs, orders = problem(**CASES["typical"])
    with torch.no_grad():
        inputs[name].flatten()[0] = float("nan")
        y = selective_scan(**inputs, orders=orders, engine=engine)
    assert y[0, 0].isnan().any()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("engine", RUNNING)
def test_only_the_gradients_asked_for(engine):
    inputs, orders = problem(**CASES["odd"])
    expected = run(in_double(inputs), orders, "reference")
    frozen = {name: value.detach() for name, value in inputs.items()} | {"A": inputs["A"]}
    y = selective_scan(**frozen, orders=orders, engine=engine)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    (gradient,) = torch.autograd.grad((y * weight).sum(), [inputs["A"]])
    assert_close({"dA": gradient}, {"dA": expected["dA"]}, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("engine", RUNNING)
def test_more_positions_than_a_cache_holds(engine):
    inputs, orders = problem(1, 1, 2, (96, 96), 5, 3)
    tensors = {name: value.detach() for name, value in inputs.items()}
    y = selective_scan(**tensors, orders=orders, engine=engine)
    expected = selective_scan(**in_double(tensors), orders=orders, engine="reference")
    assert_close({"y": y}, {"y": expected.detach()}, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per-order"])
@pytest.mark.parametrize("engine", RUNNING)
def test_same_bits_every_time(engine, per_order):
    inputs, orders = problem(2, 3, 4, (6, 8), 70, 16, per_order=per_order)
    first, second = run(inputs, orders, engine), run(inputs, orders, engine)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per-order"])
@pytest.mark.skipif("native" not in RUNNING, reason="no C compiler here")
def test_same_bits_for_any_number_of_threads(per_order):
    inputs, orders = problem(2, 3, 4, (6, 8), 70, 16, per_order=per_order)
    values = [value.detach() for value in inputs.values()]

    def both() -> list[Tensor]:
        y, kept = torch.ops.pamm.selective_scan(*values, orders, True, "native", True)
        return [y, *torch.ops.pamm.selective_scan_backward(y, *values, orders, kept, True, "native")]

    assert_same_bits_for_any_number_of_threads(both)


def test_raster_orders_of_mtmamba():
    inputs, _ = problem(1, 2, 4, (5, 6), 6, 4, per_order=True)
    orders = row_column_orders(5, 6)
    expected = run(in_double(inputs), orders, "reference")
    for engine in RUNNING:
        assert_close(run(inputs, orders, engine), expected, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per-order"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own checker's
@pytest.mark.parametrize("engine", [name for name in RUNNING if hasattr(ENGINES[name], "backward")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration_as_an_operator(engine, per_order, dtype):
    """The operator that torch.compile sees: its schema, its shapes without values, its gradient's registration."""
    inputs, orders = problem(1, 2, 2, (3, 4), 6, 4, per_order=per_order)
    for name in ("x", "delta"):
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.pamm.selective_scan.default, (*inputs.values(), orders, True, engine, True))


@pytest.mark.parametrize("engine", RUNNING)
def test_compiles_to_one_graph(engine):
    inputs, orders = problem(**CASES["odd"])

    def function(**values):
        return selective_scan(**values, orders=orders, engine=engine)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), function(**inputs))


def test_shapes_without_values():
    inputs, orders = problem(**CASES["odd"])
    y = selective_scan(**{name: value.to("meta") for name, value in inputs.items()}, orders=orders)
    assert (y.shape, y.device.type) == (inputs["x"].shape, "meta")


@needs_x86
@pytest.mark.skipif("native" not in RUNNING, reason="no C compiler here")
@pytest.mark.parametrize("narrower", NARROWER)
def test_kernel_of_older_processors(narrower, tmp_path):
    with not_yet_loaded(native, tmp_path, narrower):
        for per_order in (False, True):
            inputs, orders = problem(**CASES["odd"], per_order=per_order)
            expected = run(in_double(inputs), orders, "reference")
            assert_close(run(inputs, orders, "native"), expected, FLOAT32_TOLERANCE)
        lanes = dict(zip(NARROWER, ("8 channels per vector", "4 channels per vector"), strict=True))
        assert lanes[narrower] in explain()[0].reason


@pytest.mark.skipif("native" not in RUNNING, reason="no C kernel here")
@pytest.mark.parametrize("per_order", [False, True])
def test_the_kernel_computes_on_the_cpu_whatever_the_default_device(per_order):
    inputs, orders = problem(**CASES["odd"], per_order=per_order)
    given = Inputs(*(inputs[name].detach() for name in NAMES), orders, True)
    y, kept = native.forward(given, True)
    expected = [y, *native.backward(y, given, kept)]
    with torch.device("meta"):
        y, kept = native.forward(given, True)
        found = [y, *native.backward(y, given, kept)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_native_engine_says_what_it_refuses():
    inputs, orders = problem(**CASES["odd"], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"scan engine 'native' cannot run this: .*(float64|compiler|PAMM_KERNELS)"):
        selective_scan(**inputs, orders=orders, engine="native")


# -- choosing an engine, and errors -------------------------------------------------------------------------------------


def test_automatic_choice_takes_any_input():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        inputs, orders = problem(**CASES["odd"], dtype=dtype)
        assert choose("cpu", dtype) in ENGINES
        assert selective_scan(**inputs, orders=orders).dtype == dtype


def test_explain_gives_a_reason_for_every_engine():
    rows = explain()
    assert [row.engine for row in rows] == [*ENGINES, "reference"]
    assert all(row.reason for row in rows)
    assert {row.engine for row in rows if row.available} >= {"step", "reference"}


def test_environment_variable_replaces_the_automatic_choice(monkeypatch):
    monkeypatch.setenv("PAMM_SCAN_ENGINE", "reference")
    assert choose("cpu", torch.float32) == "reference"
    assert choose("cpu", torch.float32, "step") == "step"
    monkeypatch.setenv("PAMM_SCAN_ENGINE", "cuda")
    with pytest.raises(ValueError, match=r"PAMM_SCAN_ENGINE=cuda: unknown scan engine; known engines: auto, .*step"):
        choose("cpu", torch.float32)


def test_unknown_engine_names_the_known_ones():
    inputs, orders = problem(**CASES["odd"])
    with pytest.raises(
        ValueError, match=r"engine='fast': unknown scan engine; known engines: auto, .*step, .*reference"
    ):
        selective_scan(**inputs, orders=orders, engine="fast")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[0], "x: found shape .* expected 4 axes"),
        ("delta", lambda t: t[0], "delta: found shape"),
        ("delta", lambda t: t[..., 1:], r"delta: found shape \(1, 3, 15, 6\), expected \(1, 3, 15, 7\)"),
        ("A", lambda t: t[:, 1:], "A: found shape"),
        ("B", lambda t: t[..., 1:], "B: found shape .* state size 5 and parameters shared by the orders"),
        ("C", lambda t: t[:, :, None], "C: found shape"),
        ("D", lambda t: t[0], "D: found shape"),
        ("delta_bias", lambda t: t[0], "delta_bias: found shape"),
        ("orders", lambda t: t[:, 1:], "orders: found shape"),
        ("orders", lambda t: t.int(), "orders: found torch.int32"),
        ("orders", lambda t: t.repeat(3, 1), r"orders: found torch.int64 of shape .*expected int64 \(1 to 8 orders"),
        ("orders", lambda t: t + 1, "orders: every row must hold each position from 0 to 14 exactly once"),
        ("orders", lambda t: t * 0, "orders: every row must hold each position from 0 to 14 exactly once"),
        ("x", lambda t: t[:0], "expected|nothing to scan"),
        ("x", lambda t: t.to("meta"), "is on cpu and x on meta"),
    ],
)
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_wrong_inputs_are_named(engine, name, change, message):
    inputs, orders = problem(**CASES["odd"])
    inputs["orders"] = orders
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs, engine=engine)
