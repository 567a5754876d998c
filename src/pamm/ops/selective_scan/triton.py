"""The selective scan as Triton kernels for GPUs; with TRITON_INTERPRET=1 Triton's interpreter runs them on the CPU, for tests.

Forward keeps the states at every CHUNK-th position; backward recomputes those between. Orders and groups of channel tiles are
spread over programs only as far as a GPU needs to be filled, since every spread costs a float32 copy of a sum.
"""

from __future__ import annotations

import importlib
import os
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from pamm.ops.selective_scan.inputs import Inputs

RANK = 20

CHUNK = 64
"""Positions between two kept states: their memory is 1/64 of all states'."""
UNROLL = 4
"""Positions computed together; backward holds their states and decays in registers."""
TILE = 512
"""States × channels of a program, 16 to a lane: with fewer the sums across lanes weigh more, more do not fit the registers."""
WIDEST = 64
"""Largest number of channels of a tile."""
PROGRAMS = 2048
"""Programs to aim at: about what the largest GPUs hold at a time. Fixed, so that all GPUs sum in one order."""
LARGEST = 2**31 - 1
"""Offsets inside one sequence are 32-bit integers."""
LOG2E = 1.4426950408889634
KERNELS = "pamm.ops.selective_scan._triton_kernels"
"""Imported at need: it imports triton."""


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why this engine cannot run on this machine, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed; it comes with torch's builds for NVIDIA and AMD GPUs on Linux"
    if not _interpreted() and not torch.cuda.is_available():
        return "torch finds no GPU here; with TRITON_INTERPRET=1 Triton's interpreter would run it on the CPU, slowly"
    try:
        importlib.import_module(KERNELS)
    except Exception as error:
        return f"Triton does not import: {type(error).__name__}: {error}"
    return None


def refuses(device: str, dtype: torch.dtype) -> str | None:
    """Why this engine does not take inputs on this kind of device and of this dtype, or None."""
    if device != "cuda" and not (device == "cpu" and _interpreted()):
        return f"the Triton kernels run on GPUs, the inputs are on {device}"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32, the inputs are float64"
    return None


def describe() -> str:
    if _interpreted():
        return "Triton kernels run by Triton's interpreter (TRITON_INTERPRET is set): for tests, very slow"
    return f"Triton kernels on {torch.cuda.get_device_name()}"


def kept(inputs: Inputs, keep: bool) -> Tensor:
    """A tensor without values shaped like the states that `forward` keeps."""
    G, images, K, length, channels, N = inputs.sizes()
    chunks = -(-length // CHUNK) if keep else 0
    return inputs.A.new_empty(G * images, K, chunks, N, channels)


def forward(inputs: Inputs, keep: bool) -> tuple[Tensor, Tensor]:
    """Contract: see `pamm.ops.selective_scan`."""
    plan, x, states = _plan(inputs), inputs.x, kept(inputs, keep)
    y = x.new_empty(plan.rows, plan.copies, *x.shape[2:], dtype=torch.float32)
    grid = (plan.tiles, plan.rows, plan.copies)
    _launch("scan_forward", grid, plan, *_read(inputs), y, states, *plan.sizes, KEEP=keep)
    return y.sum(1).view(x.shape).to(x.dtype), states


def backward(dy: Tensor, inputs: Inputs, kept: Tensor) -> tuple[Tensor, ...]:
    """Contract: see `pamm.ops.selective_scan`."""
    plan = _plan(inputs)
    slices, tiles = _slices(plan)
    scratch, *sums = _backward_buffers(plan, inputs.x, slices)
    grid = (slices, plan.rows, plan.copies)
    tensors = (dy.contiguous(), *_read(inputs), kept, scratch, *sums)
    _launch("scan_backward", grid, plan, *tensors, *plan.sizes, tiles, covered=slices * tiles)

    dx, dstep, dA, dB, dC = sums
    dx, dA = dx.sum(1).view(inputs.x.shape), dA.sum(1).transpose(-1, -2)
    if plan.per_order:
        dB, dC = dB.sum(0), dC.sum(0)
    else:
        dstep, dA, dB, dC = dstep.sum(2), dA.sum(1), dB.sum((0, 3)), dC.sum((0, 3))
    return inputs.gradients(dy, dx, dstep, dA, dB, dC)


class _Plan(NamedTuple):
    """How a problem is spread over programs."""

    rows: int
    """Groups × images."""
    copies: int
    """The number of orders where each goes to programs of its own, else 1."""
    tiles: int
    """Channel tiles."""
    block_n: int
    block_d: int
    per_order: bool
    sizes: tuple[int, ...]
    """images, orders, positions, states, channels, chunks."""


def _plan(inputs: Inputs) -> _Plan:
    G, images, K, length, channels, N = inputs.sizes()
    if length * max(channels, N) > LARGEST or -(-length // CHUNK) * N * channels > LARGEST:
        raise ValueError(
            f"{length} positions of {channels} channels and {N} states: the Triton kernels take at most {LARGEST} values "
            "per image and order; use engine='step'"
        )
    block_n = _power_of_two(N)
    block_d = min(max(TILE // block_n, 4), WIDEST, _power_of_two(channels))
    tiles = -(-channels // block_d)
    copies = K if G * images * tiles < PROGRAMS else 1
    sizes = (images, K, length, N, channels, -(-length // CHUNK))
    return _Plan(G * images, copies, tiles, block_n, block_d, inputs.per_order(), sizes)


def _slices(plan: _Plan) -> tuple[int, int]:
    """How many programs of backward share the channel tiles of an image, and the tiles of each."""
    tiles = -(-plan.tiles // min(plan.tiles, -(-PROGRAMS // (plan.rows * plan.copies))))
    return -(-plan.tiles // tiles), tiles


def _backward_buffers(plan: _Plan, x: Tensor, slices: int) -> list[Tensor]:
    """Scratch memory, dx, dΔ, dA, dB and dC, with an axis for every sum that is left to make."""
    images, K, length, N, channels, _ = plan.sizes
    G, owners = x.shape[0], K if plan.per_order else plan.copies
    shapes = (
        (slices * plan.rows * plan.copies * CHUNK // UNROLL, plan.block_n * plan.block_d),
        (plan.rows, plan.copies, length, channels),
        (G, images, owners, length, channels),
        (G, images, K, N, channels),
        (slices, G, images, owners, length, N),
        (slices, G, images, owners, length, N),
    )
    return [x.new_empty(shape, dtype=torch.float32) for shape in shapes]


def _power_of_two(size: int) -> int:
    """The smallest that is not below size."""
    return 1 << (size - 1).bit_length()


def _read(inputs: Inputs) -> tuple[Tensor, ...]:
    """The inputs of both kernels. Δ is made here: in the kernels every lane of a channel would repeat the softplus, and every
    order again, which costs more instructions than it saves in memory traffic."""
    A = inputs.A.transpose(-1, -2) * LOG2E
    tensors = (inputs.x, inputs.steps(), A, inputs.B, inputs.C, inputs.D, inputs.orders.int())
    return tuple(tensor.contiguous() for tensor in tensors)


def _launch(
    kernel: str, grid: tuple[int, ...], plan: _Plan, *arguments, covered: int | None = None, **constants
) -> None:
    """`covered`: channel tiles that the programs visit, where these are not the plan's."""
    kernels = importlib.import_module(KERNELS)
    _, _, length, N, channels, _ = plan.sizes
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        getattr(kernels, kernel)[grid](
            *arguments,
            PER_ORDER=plan.per_order,
            SPLIT=plan.copies > 1 or plan.sizes[1] == 1,
            EVEN_N=plan.block_n == N,
            EVEN_D=plan.block_d * (covered or plan.tiles) == channels,
            EVEN_L=length % UNROLL == 0,
            BLOCK_N=plan.block_n,
            BLOCK_D=plan.block_d,
            CHUNK=CHUNK,
            UNROLL=UNROLL,
            num_warps=1,
            enable_fp_fusion=True,
            **constants,
        )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
