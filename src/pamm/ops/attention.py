"""Softmax attention of whole sequences, as `torch.nn.functional.scaled_dot_product_attention` without mask and dropout.

Torch multiplies inside its attention with MKL, in float32 also where the inputs are bfloat16. On an x86 processor that is not
Intel's (see `pamm.ops.product`) a C kernel takes half the time. It computes no gradients.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pamm.ops.compiled import Kernel, left_to_torch, openmp
from pamm.ops.product import BY_CONVOLUTION

SMALLEST, FEWEST_QUERIES = 1 << 22, 32
"""Multiplications and queries from which on the kernel pays: keys and values are copied first."""

JOBS = 2
"""Jobs per thread to aim at: heads of few images are split into ranges of queries, each with its copy of keys and values."""


class _Heads(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("image", "head", "row")))


class _Attention(ctypes.Structure):
    """`Attention` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ["images", "heads", "queries", "keys", "width", "ranges", "half"]),
        ("scale", ctypes.c_float),
        *((name, _Heads) for name in "qkvy"),
        ("work", ctypes.c_void_p),
    )


def _declare(library: ctypes.CDLL) -> None:
    problem = ctypes.POINTER(_Attention)
    library.attention_workspace.argtypes, library.attention_workspace.restype = [problem], ctypes.c_int64
    library.attention_run.argtypes, library.attention_run.restype = [problem, ctypes.c_int, ctypes.c_void_p], None


KERNEL = Kernel(Path(__file__).with_suffix(".c"), _declare)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ / √width)·v: (B, heads, queries, width), twice (B, heads, keys, width) → (B, heads, queries, width)."""
    if _suits(q, k, v) and _available():
        return torch.ops.pamm.attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return (
        not left_to_torch()
        and not learns
        and q.device.type == k.device.type == v.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.dim() == 4
        and k.shape == v.shape == (*q.shape[:2], k.shape[-2], q.shape[-1])
        and q.shape[2] >= FEWEST_QUERIES
        and q.numel() * k.shape[2] >= SMALLEST
    )


def objection() -> str | None:
    """Why torch's attention runs on this machine, or None."""
    if not BY_CONVOLUTION:
        return "its products are fast on this processor"
    return KERNEL.unavailable()


@torch.compiler.assume_constant_result
def _available() -> bool:
    return objection() is None


@torch.library.custom_op("pamm::attention", mutates_args=(), device_types="cpu")
def kernel_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` by the C kernel; the result's heads lie side by side in memory, as the layer after it wants them."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    y = _empty(q)
    images, heads, queries, width = q.shape
    threads = torch.get_num_threads()
    ranges = max(1, min(-(-JOBS * threads // (images * heads)), queries))
    places = (_Heads(x.data_ptr(), *x.stride()[:3]) for x in (q, k, v, y))
    half = q.dtype == torch.bfloat16
    problem = _Attention(images, heads, queries, k.shape[2], width, ranges, half, width**-0.5, *places)
    size = KERNEL.library().attention_workspace(ctypes.byref(problem))
    problem.work = KERNEL.workspace("work", threads * size)
    KERNEL.library().attention_run(ctypes.byref(problem), threads, openmp())
    return y


@kernel_attention.register_fake
def _empty(q: Tensor, *_: Tensor) -> Tensor:
    images, heads, queries, width = q.shape
    return q.new_empty(images, queries, heads, width).transpose(1, 2)
