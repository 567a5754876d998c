"""Products of matrices in float32 by a C kernel, with gradients, for operands that lie in memory in any way.

On x86 torch multiplies float32 matrices with MKL, which on processors of other makers than Intel does not use the widest
vectors. There the kernel takes half the time, and it multiplies all tasks in one call.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pamm.nn.replace import taking_over
from pamm.nn.task_layers import TaskLinear
from pamm.ops.compiled import Kernel, left_to_torch, openmp

LANES = 8
"""Numbers in a vector from which on the kernel pays: AVX2 and AVX-512."""

SMALLEST = 1 << 24
"""Multiplications from which on a product pays."""

FEWEST_ROWS, SMALLEST_WEIGHT = 32, 1 << 15
"""Rows and weights of a product from which on it pays: the kernel copies both first."""

WIDEST = 384
"""Largest number of columns of a job's block of the result; their factors then stay in the second cache."""

STEP_ROWS, STEP_COLUMNS = 12, 32
"""Rows and columns of blocks are multiples of these."""

COPYING_ROWS, COPYING_COLUMNS = 24, 16
"""A block's copies of its operands take as long as multiplying this many rows and columns more."""


class _Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "row", "column")))


class _Product(ctypes.Structure):
    """`Product` of matrix.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "rows", "columns", "depth", "block_rows", "block_columns")),
        ("a", _Matrix),
        ("b", _Matrix),
        *((name, ctypes.c_void_p) for name in ("bias", "c", "work")),
    )


def _declare(library: ctypes.CDLL) -> None:
    library.matrix_workspace.argtypes, library.matrix_workspace.restype = [ctypes.c_int64], ctypes.c_int64
    library.matrix_run.argtypes, library.matrix_run.restype = (
        [ctypes.POINTER(_Product), ctypes.c_int, ctypes.c_void_p],
        None,
    )


KERNEL = Kernel(Path(__file__).with_suffix(".c"), _declare)


def multiplies_slowly() -> bool:
    """Whether torch's float32 products are slow here: by MKL, on an x86 processor that is not Intel's."""
    if platform.machine().lower() not in ("x86_64", "amd64", "x86"):
        return False
    return torch.backends.mkl.is_available() and "Intel" not in _maker()


def _maker() -> str:
    """Who made the processor, e.g. "AuthenticAMD"; "Intel" if the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.environ.get("PROCESSOR_IDENTIFIER", "Intel")
    return next((line for line in lines if line.startswith("vendor_id")), "Intel")


SLOW_PRODUCTS = multiplies_slowly()


def objection() -> str | None:
    """Why the kernel is not used on this machine, or None."""
    return KERNEL.unavailable(LANES) if SLOW_PRODUCTS else "torch's products are fast on this processor"


@torch.compiler.assume_constant_result
def _available() -> bool:
    return objection() is None


class KernelLinear(nn.Linear):
    """`torch.nn.Linear` whose product is `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class KernelTaskLinear(TaskLinear):
    """`TaskLinear` whose products are `batched_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return batched_linear(x.flatten(1, -2), self.weight, self.bias).unflatten(1, x.shape[1:-1])


def replacement(module: nn.Module) -> nn.Module | None:
    """A linear layer whose products the kernel may take, in the state of `module`; None for other modules."""
    return taking_over(KernelLinear, module, nn.Linear) or taking_over(KernelTaskLinear, module, TaskLinear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b, as `torch.nn.functional.linear`: (..., i), (o, i), (o,) → (..., o). Any device and dtype, differentiable."""
    fits = x.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])
    if not (fits and _takes(x, weight, bias, x.numel() // max(1, x.shape[-1]), weight.numel())):
        return F.linear(x, weight, bias)
    rows = x.reshape(1, -1, x.shape[-1])
    y = torch.ops.pamm.product(rows, weight.T[None], None if bias is None else bias[None], False)
    return y.view(*x.shape[:-1], len(weight))


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One product per entry of the leading axis: (T, n, i), (T, o, i), (T, 1, o) → (T, n, o), as `TaskLinear`."""
    fits = x.shape[::2] == weight.shape[::2] and (bias is None or bias.shape == (len(x), 1, weight.shape[1]))
    if fits and _takes(x, weight, bias, x.shape[1], weight[0].numel()):
        return torch.ops.pamm.product(x, weight.mT, None if bias is None else bias.flatten(1), False)
    if x.shape[1] == 1:  # of single columns instead of rows, so that the weights' gradient comes in their own layout
        column = x.mT
        return (torch.bmm(weight, column) if bias is None else torch.baddbmm(bias.mT.to(x.dtype), weight, column)).mT
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.to(x.dtype), x, weight.mT)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, weights: int) -> bool:
    """Whether the kernel takes products of `rows` rows with `weights` weights each. Autocast asks for another dtype."""
    return (
        all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, weight, bias) if t is not None)
        and not torch.is_autocast_enabled("cpu")
        and rows >= FEWEST_ROWS
        and weights >= SMALLEST_WEIGHT
        and rows * weights >= SMALLEST
        and not left_to_torch()
        and _available()
    )


@torch.library.custom_op("pamm::product", mutates_args=(), device_types="cpu")
def kernel_product(a: Tensor, b: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
    """(T, n, i), (T, i, o), (T, o) → a·b + bias, (T, n, o), with its columns side by side in memory; where `turned` its rows.

    Raises ValueError for other shapes and dtypes than float32, and for a bias where `turned`.
    """
    _check(a, b, bias, turned)
    result = _empty(a, b, bias, turned)
    if a.numel() * b.numel() == 0:
        return result.zero_() if bias is None else result.copy_(bias[:, None])
    a, b = _side_by_side(a), _side_by_side(b)
    if turned:
        a, b = b.mT, a.mT
    batch, rows, depth = a.shape
    columns, threads = b.shape[2], torch.get_num_threads()
    block_rows, block_columns = _blocks(batch, rows, columns, threads)
    problem = _Product(batch, rows, columns, depth, block_rows, block_columns, _matrix(a), _matrix(b))
    problem.bias = None if bias is None else (bias := bias.contiguous()).data_ptr()
    problem.c = result.data_ptr()
    problem.work = KERNEL.workspace("work", threads * KERNEL.library().matrix_workspace(block_columns))
    KERNEL.library().matrix_run(ctypes.byref(problem), threads, openmp())
    return result


@kernel_product.register_fake
def _empty(a: Tensor, b: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
    batch, rows, columns = len(a), a.shape[1], b.shape[2]
    return a.new_empty(batch, columns, rows).mT if turned else a.new_empty(batch, rows, columns)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    a, b, _, _ = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Each gradient in its operand's layout; by torch if the gradients need gradients of their own."""
    a, b = ctx.saved_tensors
    of_a, of_b, of_bias, _ = ctx.needs_input_grad
    return (
        _gradient(dy, b.mT, a) if of_a else None,
        _gradient(a.mT, dy, b) if of_b else None,
        dy.sum(1) if of_bias else None,
        None,
    )


kernel_product.register_autograd(_backward, setup_context=_keep)


def _gradient(a: Tensor, b: Tensor, operand: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return torch.bmm(a, b)
    return torch.ops.pamm.product(a, b, None, operand.stride(-1) != 1 and operand.stride(-2) == 1)


def _check(a: Tensor, b: Tensor, bias: Tensor | None, turned: bool) -> None:
    """Raises ValueError for arguments that the kernel would read wrongly."""
    tensors = [a, b] if bias is None else [a, b, bias]
    fitting = (
        a.dim() == b.dim() == 3
        and (len(a), a.shape[2]) == tuple(b.shape[:2])
        and (bias is None or (bias.shape == (len(b), b.shape[2]) and not turned))
    )
    if not fitting or any(tensor.dtype != torch.float32 for tensor in tensors):
        found = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors)
        raise ValueError(
            f"found {found}, turned={turned}; expected (T, n, i), (T, i, o) and a bias (T, o) unless turned, all float32"
        )


def _side_by_side(matrix: Tensor) -> Tensor:
    """With its rows or its columns side by side."""
    return matrix if 1 in matrix.stride()[1:] else matrix.contiguous()


def _matrix(tensor: Tensor) -> _Matrix:
    return _Matrix(tensor.data_ptr(), *tensor.stride())


@lru_cache(maxsize=1024)
def _blocks(batch: int, rows: int, columns: int, threads: int) -> tuple[int, int]:
    """Rows and columns of a job's block, for the threads to end early and together, with two jobs each in case one is held up."""

    def duration(block: tuple[int, int]) -> int:
        jobs = batch * -(-rows // block[0]) * -(-columns // block[1])
        return max(2, -(-jobs // threads)) * (block[0] + COPYING_ROWS) * (block[1] + COPYING_COLUMNS)

    heights = {_share(rows, parts, STEP_ROWS) for parts in range(1, 2 + rows // (4 * STEP_ROWS))}
    widths = {
        _share(columns, parts, STEP_COLUMNS) for parts in range(-(-columns // WIDEST), 2 + columns // STEP_COLUMNS)
    }
    return min(((height, width) for height in sorted(heights) for width in sorted(widths)), key=duration)


def _share(size: int, parts: int, step: int) -> int:
    return -(-size // (parts * step)) * step
