"""Softmax attention of whole sequences, as `torch.nn.functional.scaled_dot_product_attention` without mask and dropout.

Torch multiplies inside its attention with MKL, in float32 also where the inputs are bfloat16. On an x86 processor that is not
Intel's (see `pamm.kernels.matrix`) a C kernel takes half the time, forward and backward.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention  # pyright: ignore[reportPrivateImportUsage] (its home differs by version)
from torch import Tensor, nn

from pamm.kernels import matrix
from pamm.nn.replace import taking_over
from pamm.ops.compiled import Kernel, left_to_torch, openmp

SMALLEST, FEWEST_QUERIES = 1 << 22, 32
"""Multiplications and queries from which on the kernel pays: keys and values are copied first."""

JOBS = 2
"""Jobs per thread to aim at: heads of few images are split into ranges of queries, each with its copy of keys and values.

Going backward they are split only where there are fewer heads than threads, since that takes 7 products instead of 5.
"""


class _Heads(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("image", "head", "row")))


class _Attention(ctypes.Structure):
    """`Attention` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ["images", "heads", "queries", "keys", "width", "ranges", "half"]),
        ("scale", ctypes.c_float),
        *((name, _Heads) for name in ("q", "k", "v", "y", "dy", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("rows", "work")),
    )


def _declare(library: ctypes.CDLL) -> None:
    problem = ctypes.POINTER(_Attention)
    for name in ("attention", "attention_backward"):
        workspace, run = getattr(library, f"{name}_workspace"), getattr(library, f"{name}_run")
        workspace.argtypes, workspace.restype = [problem], ctypes.c_int64
        run.argtypes, run.restype = [problem, ctypes.c_int, ctypes.c_void_p], None


KERNEL = Kernel(Path(__file__).with_suffix(".c"), _declare)


class KernelAttention(Attention):
    """timm's attention, with nothing between attention and output layer, by `attention`."""

    def forward(self, x: Tensor, *masks: Any, **options: Any) -> Tensor:
        """(B, L, C) → (B, L, C). timm's own form with a mask, with dropout and where its attention maps are to be seen."""
        plain = all(mask is None or mask is False for mask in (*masks, *options.values()))
        drops = self.training and self.attn_drop.p > 0
        if drops or not plain or not self.fused_attn:
            return super().forward(x, *masks, **options)
        parts = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        y = attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


def replacement(module: nn.Module) -> nn.Module | None:
    """A ViT's attention by the kernel, in the state of `module`; None for other modules.

    Not every release of timm has all of the parts that may stand between attention and output layer.
    """
    between = (getattr(module, name, None) for name in ("norm", "gate"))
    if not hasattr(module, "head_dim") or any(part is not None and type(part) is not nn.Identity for part in between):
        return None
    return taking_over(KernelAttention, module, Attention)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ / √width)·v: (B, heads, queries, width), twice (B, heads, keys, width) → (B, heads, queries, width)."""
    if _suits(q, k, v) and _available():
        return torch.ops.pamm.attention(q, k, v)[0]
    return F.scaled_dot_product_attention(q, k, v)


def _suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        not left_to_torch()
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
    return KERNEL.unavailable() if matrix.SLOW_PRODUCTS else "torch's products are fast on this processor"


@torch.compiler.assume_constant_result
def _available() -> bool:
    return objection() is None


@torch.library.custom_op("pamm::attention", mutates_args=(), device_types="cpu")
def kernel_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`attention` by the C kernel; the result's heads lie side by side in memory, as the layer after it wants them.

    Beside it what its gradients need, (B, heads, queries, 2): a row's largest score and one over its sum of exponentials.
    """
    q, k, v = (_with_columns_side_by_side(x) for x in (q, k, v))
    y, rows = _empty(q)
    _run("attention", q=q, k=k, v=v, y=y, rows=rows, ranges=_ranges(q))
    return y, rows


@kernel_attention.register_fake
def _empty(q: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return _side_by_side(q), q.new_empty(*q.shape[:3], 2, dtype=torch.float32)


@torch.library.custom_op("pamm::attention_backward", mutates_args=(), device_types="cpu")
def kernel_gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of y, and what the kernel returned."""
    dy, q, k, v, y = (_with_columns_side_by_side(x) for x in (dy, q, k, v, y))
    dq, dk, dv = _empty_gradients(dy, q, k)
    ranges = 1 if q.shape[0] * q.shape[1] >= torch.get_num_threads() else _ranges(q)
    rows = rows.contiguous()
    _run("attention_backward", q=q, k=k, v=v, y=y, dy=dy, dq=dq, dk=dk, dv=dv, rows=rows, ranges=ranges)
    return dq, dk, dv


@kernel_gradients.register_fake
def _empty_gradients(dy: Tensor, q: Tensor, k: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _side_by_side(q), _side_by_side(k), _side_by_side(k)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """In torch's operators where these gradients are to have gradients of their own."""
    q, k, v, y, rows = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _gradients_in_torch(dy, q, k, v)
    return torch.ops.pamm.attention_backward(dy, q, k, v, y, rows)


kernel_attention.register_autograd(_backward, setup_context=_keep)


def _gradients_in_torch(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernel_gradients`; torch's attention has no second derivatives on a CPU."""
    scale = q.shape[-1] ** -0.5
    weights = torch.softmax(scale * q @ k.mT, dim=-1)
    slopes = weights * (dy @ v.mT)
    changes = scale * (slopes - weights * slopes.sum(-1, keepdim=True))
    return changes @ k, changes.mT @ q, weights.mT @ dy


def _ranges(q: Tensor) -> int:
    """Parts of a head's queries or keys, so that there are JOBS jobs per thread."""
    images, heads, queries, _ = q.shape
    return max(1, min(-(-JOBS * torch.get_num_threads() // (images * heads)), queries))


def _run(name: str, *, rows: Tensor, ranges: int, **heads: Tensor) -> None:
    """One of the kernel's functions with the arrays of `_Attention` by name."""
    _check(rows, heads)
    q, k = heads["q"], heads["k"]
    sizes = *q.shape[:3], k.shape[2], q.shape[3], ranges, q.dtype == torch.bfloat16
    problem = _Attention(*sizes, q.shape[3] ** -0.5)
    for place, x in heads.items():
        setattr(problem, place, _Heads(x.data_ptr(), *x.stride()[:3]))
    threads, library = torch.get_num_threads(), KERNEL.library()
    each = getattr(library, f"{name}_workspace")(ctypes.byref(problem))
    problem.rows, problem.work = rows.data_ptr(), KERNEL.workspace("work", threads * each)
    getattr(library, f"{name}_run")(ctypes.byref(problem), threads, openmp())


def _check(rows: Tensor, heads: dict[str, Tensor]) -> None:
    """Raises ValueError for what the kernel would read wrongly."""
    shape, dtype = heads["q"].shape, heads["q"].dtype
    of_keys = (*shape[:2], heads["k"].shape[2], *shape[3:])
    right = all(x.shape == (of_keys if place in ("k", "v", "dk", "dv") else shape) for place, x in heads.items())
    right = right and dtype in (torch.float32, torch.bfloat16) and all(x.dtype == dtype for x in heads.values())
    if not right or rows.shape != (*shape[:3], 2) or rows.dtype != torch.float32:
        found = ", ".join(f"{place} {tuple(x.shape)} {x.dtype}" for place, x in {**heads, "rows": rows}.items())
        raise ValueError(
            f"found {found}; expected q, y and dy (B, heads, queries, width), k and v (B, heads, keys, width), all float32 or "
            "all bfloat16, and rows as the forward pass returned them"
        )


def _with_columns_side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _side_by_side(x: Tensor) -> Tensor:
    """Empty, of the same shape, the heads side by side in memory."""
    images, heads, rows, width = x.shape
    return x.new_empty(images, rows, heads, width).transpose(1, 2)
