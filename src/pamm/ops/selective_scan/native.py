"""The selective scan as a C kernel for CPUs (see `pamm.ops.compiled`)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from pamm.ops.compiled import Kernel, openmp
from pamm.ops.selective_scan.inputs import Inputs

RANK = 10

JOBS = 32
"""Backward jobs to aim at; fixed, so that results do not depend on the number of threads."""
PARTS_LIMIT = 2**26
"""Bytes that the jobs' own gradients of B and C may take beyond one job per image."""

_INTEGERS = "groups images orders_count sets length channels states slices half softplus"
_VIEWS = "x delta B C dy"
_POINTERS = "A D bias orders y dx ddelta dA dB dC dD dbias work parts"


class _View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("group", "image", "set", "row")))


class _Problem(ctypes.Structure):
    """`Problem` of scan_problem.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS.split()),
        *((name, _View) for name in _VIEWS.split()),
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
    )


def _declare(library: ctypes.CDLL) -> None:
    library.scan_workspace.argtypes, library.scan_workspace.restype = [ctypes.c_int64], ctypes.c_int64
    library.scan_parts.argtypes, library.scan_parts.restype = [ctypes.POINTER(_Problem)], ctypes.c_int64
    library.scan_run.argtypes, library.scan_run.restype = (
        [ctypes.POINTER(_Problem), ctypes.c_int, ctypes.c_void_p],
        None,
    )


KERNEL = Kernel(Path(__file__).with_name("scan.c"), _declare)


def unavailable() -> str | None:
    """Why this engine cannot run on this machine, or None. The first call compiles the kernel."""
    return KERNEL.unavailable()


def refuses(device: str, dtype: torch.dtype) -> str | None:
    """Why this engine does not take inputs on this kind of device and of this dtype, or None."""
    if device != "cpu":
        return f"the C kernel runs on the CPU, the inputs are on {device}"
    if dtype == torch.float64:
        return "the C kernel computes in float32, the inputs are float64"
    return None


def describe() -> str:
    return f"C kernel for the CPU, {KERNEL.library().vector_lanes()} channels per vector, {torch.get_num_threads()} threads"


def kept(inputs: Inputs, keep: bool) -> Tensor:
    """Nothing is kept: the backward pass recomputes the states."""
    return inputs.A.new_empty(0)


def forward(inputs: Inputs, keep: bool) -> tuple[Tensor, Tensor]:
    """Contract: see `pamm.ops.selective_scan`."""
    call = _Call(inputs)
    y = call.output("y", inputs.x.shape, call.dtype)
    call.run()
    return y.to(inputs.x.dtype), kept(inputs, keep)


def backward(dy: Tensor, inputs: Inputs, kept: Tensor) -> tuple[Tensor, ...]:
    """Contract: see `pamm.ops.selective_scan`."""
    call = _Call(inputs)
    x, delta, A, B, C, D, delta_bias = inputs.tensors()
    G, images = x.shape[:2]
    call.view("dy", dy.to(call.dtype))
    dx, ddelta = call.output("dx", x.shape, call.dtype), call.output("ddelta", delta.shape, call.dtype)
    dB, dC = call.output("dB", B.shape), call.output("dC", C.shape)
    dA = call.output("dA", (G, images, *A.shape[1:]))
    dbias = call.output("dbias", (G, images, *delta_bias.shape[1:]))
    dD = call.output("dD", (G, images, D.shape[-1]))
    call.reserve_parts()
    call.run()
    dD = inputs.skip_gradient(dD.sum(1))
    return dx.to(x.dtype), ddelta.to(delta.dtype), dA.sum(1), dB, dC, dD, dbias.sum(1)


class _Call:
    """The kernel's argument and the tensors that it points to.

    `dtype` is that in which x, delta, y and their gradients pass: float32, or bfloat16 where x and delta are.
    """

    def __init__(self, inputs: Inputs):
        self.library = KERNEL.library()
        x, delta, A, B, C, D, bias, orders, softplus = inputs
        half = x.dtype == torch.bfloat16
        self.dtype = torch.bfloat16 if half else torch.float32
        self.held: list[Tensor] = []
        G, images, K, length, channels, N = inputs.sizes()
        sets = K if inputs.per_order() else 1
        self.problem = _Problem(G, images, K, sets, length, channels, N, 1, half, softplus)
        for name, tensor in (("x", x), ("delta", delta)):
            self.view(name, tensor.to(self.dtype))
        for name, tensor in (("B", B), ("C", C)):
            self.view(name, tensor)
        for name, tensor in (("A", A), ("D", D), ("bias", bias), ("orders", orders.int())):
            self.array(name, tensor.contiguous())

    def array(self, name: str, tensor: Tensor) -> Tensor:
        """Point to a contiguous tensor."""
        self.held.append(tensor)
        setattr(self.problem, name, tensor.data_ptr())
        return tensor

    def view(self, name: str, tensor: Tensor) -> None:
        """Point to a (G, images, length, columns) or (G, images, sets, length, columns) tensor with adjacent columns."""
        tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        self.held.append(tensor)
        group, image, *sets, row, _ = tensor.stride()
        setattr(self.problem, name, _View(tensor.data_ptr(), group, image, sets[0] if sets else 0, row))

    def output(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return self.array(name, torch.empty(shape, dtype=dtype, device="cpu"))

    def reserve_parts(self) -> None:
        """Split the channels of one image into slices: as many jobs as are worth their memory."""
        problem, lanes = self.problem, self.library.vector_lanes()
        bytes_each = 4 * self.library.scan_parts(ctypes.byref(problem))
        wanted = -(-JOBS // (problem.groups * problem.images))
        problem.slices = max(1, min(-(-problem.channels // lanes), wanted, PARTS_LIMIT // bytes_each))
        problem.parts = KERNEL.workspace("parts", self.library.scan_parts(ctypes.byref(problem)))

    def run(self) -> None:
        threads = torch.get_num_threads()
        self.problem.work = KERNEL.workspace("work", threads * self.library.scan_workspace(self.problem.length))
        self.library.scan_run(ctypes.byref(self.problem), threads, openmp())
