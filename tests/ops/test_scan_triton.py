"""The Triton kernels: against the reference through Triton's interpreter, compiled for a GPU without one, run on one."""

import pytest
import torch
from test_selective_scan import (
    BFLOAT16_TOLERANCE,
    CASES,
    FLOAT32_TOLERANCE,
    assert_close,
    in_double,
    problem,
    run,
)

from c_kernels import in_fresh_process
from pamm.ops.selective_scan import selective_scan, triton
from pamm.ops.selective_scan.inputs import Inputs

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = {
    "odd": {"G": 2, "images": 2, "K": 3, "size": (1, 3), "channels": 7, "N": 5},
    "two-chunks": {"G": 1, "images": 1, "K": 1, "size": (2, 33), "channels": 4, "N": 4},
    "tiles": {"G": 1, "images": 2, "K": 2, "size": (1, 4), "channels": 40, "N": 16},
    "one-state": {"G": 1, "images": 1, "K": 1, "size": (1, 2), "channels": 3, "N": 1},
}
"""Small: the interpreter takes milliseconds a position."""


IN_PLACE, COPIES = 1, 2048
"""Programs: with few the orders and tiles are added up inside a program, with many each writes a copy."""
RUNS = [("odd", IN_PLACE, False), ("tiles", IN_PLACE, True), ("tiles", COPIES, False), ("two-chunks", COPIES, True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([*RUNS, ("one-state", IN_PLACE, False)], id="each"),
        pytest.param(
            [(case, programs, own) for case in INTERPRETED for programs in (IN_PLACE, COPIES) for own in (False, True)],
            id="all",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_interpreted_kernels_equal_reference(runs):
    in_fresh_process(
        "test_selective_scan",
        f"""
from pamm.ops.selective_scan import triton
assert choose("cpu", torch.float32, "triton") == "triton"
for case, triton.PROGRAMS, per_order in {runs}:
    inputs, orders = problem(**{INTERPRETED}[case], per_order=per_order)
    expected = run(in_double(inputs), orders, "reference")
    assert_close(run(inputs, orders, "triton"), expected, FLOAT32_TOLERANCE)
    with torch.no_grad():
        assert_close({{"y": selective_scan(**inputs, orders=orders, engine="triton")}}, {{"y": expected["y"]}}, 2e-5)
""",
        TRITON_INTERPRET="1",
    )


@pytest.mark.slow
def test_interpreted_kernels_in_bfloat16_with_extreme_steps_and_twice_the_same():
    in_fresh_process(
        "test_selective_scan",
        f"""
case = {INTERPRETED["odd"]}
inputs, orders = problem(**case, dtype=torch.bfloat16)
found = run(inputs, orders, "triton")
assert all(value.dtype == torch.bfloat16 for value in found.values())
assert_close(found, run(in_double(inputs), orders, "reference"), BFLOAT16_TOLERANCE)
again = run(inputs, orders, "triton")
assert all(torch.equal(found[name], again[name]) for name in found)

inputs, orders = problem(**case)
strided = {{name: value.detach().mT.contiguous().mT.requires_grad_() for name, value in inputs.items()}}
assert_close(run(strided, orders, "triton"), run(in_double(inputs), orders, "reference"), FLOAT32_TOLERANCE)

inputs["delta"] = (20 * torch.rand(inputs["delta"].shape) ** 8).requires_grad_()
inputs["A"] = (-64 * torch.rand(inputs["A"].shape)).requires_grad_()
del inputs["delta_bias"]
found = run(inputs, orders, "triton", softplus=False)
assert_close(found, run(in_double(inputs), orders, "reference", softplus=False), FLOAT32_TOLERANCE)
""",
        TRITON_INTERPRET="1",
    )


@pytest.mark.skipif(not triton.unavailable() and not torch.cuda.is_available(), reason="Triton's interpreter is on")
def test_inputs_on_the_cpu_are_refused_with_the_reason():
    inputs, orders = problem(**INTERPRETED["odd"])
    with pytest.raises(ValueError, match=r"scan engine 'triton' cannot run this: .*(finds no GPU|run on GPUs)"):
        selective_scan(**inputs, orders=orders, engine="triton")


def test_float64_and_problems_beyond_32_bit_offsets_are_refused():
    assert "float64" in triton.refuses("cuda", torch.float64)
    assert "mps" in triton.refuses("mps", torch.float32)
    orders = problem(**INTERPRETED["odd"])[1]
    x, B = (torch.empty(1, 1, 2**24, columns, device="meta") for columns in (256, 16))
    A, D = torch.empty(1, 256, 16, device="meta"), torch.empty(1, 256, device="meta")
    with pytest.raises(ValueError, match=r"16777216 positions of 256 channels .* use engine='step'"):
        triton.forward(Inputs(x, x, A, B, B, D, D, orders, True), keep=False)


POINTERS = ("x", "dy", "step", "A", "B", "C", "D", "orders", "y", "kept", "scratch", "dx", "dstep", "dA", "dB", "dC")
TYPES = {"x": "*bf16", "dy": "*bf16", "orders": "*i32"}


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "even"), [("scan_forward", True), ("scan_backward", False)])
def test_kernels_compile_for_a_gpu_that_is_not_here(kernel, even):
    """What the interpreter cannot tell: that the compiler takes the kernels, and that their tiles fit the registers."""
    printed = in_fresh_process(
        "test_selective_scan",
        f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pamm.ops.selective_scan import _triton_kernels
function = _triton_kernels.{kernel}
constants = dict(PER_ORDER={not even}, SPLIT={not even}, KEEP=True, EVEN_N={even}, EVEN_D={even}, EVEN_L={even},
                 BLOCK_N=16, BLOCK_D=32, CHUNK=64, UNROLL=4)
names = function.arg_names
def kind(name):
    return {TYPES}.get(name, "*fp32" if name in {POINTERS} else "constexpr" if name in constants else "i32")
source = ASTSource(function, {{name: kind(name) for name in names}},
                   {{(names.index(name),): value for name, value in constants.items() if name in names}})
options = dict(num_warps=1, enable_fp_fusion=True)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
print(len(compiled.asm["cubin"]))
""",
    )
    assert int(printed) > 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("programs", [1, 2048], ids=["sums-in-place", "copies"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per-order"])
def test_kernels_on_a_gpu_equal_reference(per_order, case, dtype, programs, monkeypatch):
    monkeypatch.setattr(triton, "PROGRAMS", programs)
    inputs, orders = problem(**CASES[case], per_order=per_order, dtype=dtype)
    expected = run(in_double(inputs), orders, "reference")
    on_gpu = {name: value.detach().cuda().requires_grad_() for name, value in inputs.items()}
    found, again = run(on_gpu, orders, "triton"), run(on_gpu, orders, "triton")
    assert all(torch.equal(found[name], again[name]) for name in found)
    tolerance = FLOAT32_TOLERANCE if dtype == torch.float32 else BFLOAT16_TOLERANCE
    assert_close({name: value.cpu() for name, value in found.items()}, expected, tolerance)
