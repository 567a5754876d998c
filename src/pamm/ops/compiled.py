"""C kernels for CPUs, compiled on first use with the system's C compiler and kept in a cache folder (`pamm.ops.kernel_cache`).

A kernel needs no header of torch and no OpenMP: it is called through ctypes with data pointers and runs on
`torch.get_num_threads()` threads: those of the OpenMP runtime that torch has loaded, or POSIX threads where it has none.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pamm.files import shown
from pamm.ops import kernel_cache

LARGE_PAGE = 2**21

VARIABLE = "PAMM_KERNELS"
"""Environment variable: "off" makes every C kernel unavailable, so that torch's own forms run."""


def exporting() -> bool:
    """Whether torch.export or torch.onnx traces the present call."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


_torch_alone = ContextVar("torch_alone", default=False)


@contextmanager
def torch_alone() -> Iterator[None]:
    """Context manager: only torch's own operators run, without C kernels. Results and counts are those of every machine."""
    token = _torch_alone.set(True)
    try:
        yield
    finally:
        _torch_alone.reset(token)


def left_to_torch() -> bool:
    """Whether this call must consist of torch's own operators.

    This holds for a graph that may run on another machine, for derivatives in forward mode, under the transforms of torch.func
    and inside `torch_alone`.
    """
    if exporting() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage] (documented)
        return True
    if torch.compiler.is_compiling():
        return False
    if _torch_alone.get() or forward_ad._current_level >= 0:
        return True
    # Private, as there is no public way to ask: tests of forward mode and torch.func run with the oldest and newest torch.
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


class Kernel:
    """The functions of a C file, which includes jobs.h. `declare` states their arguments and results.

    It is compiled when it is first asked for, once in a process.
    """

    def __init__(self, source: Path, declare: Callable[[ctypes.CDLL], None]):
        self.source, self.declare = source, declare
        self._buffers = threading.local()

    def unavailable(self, lanes: int = 1) -> str | None:
        """Why the kernel cannot run on this machine, or not with vectors of at least `lanes` numbers, or None."""
        library, reason = self._loaded
        if library is not None and library.vector_lanes() < lanes:
            return f"vectors of {library.vector_lanes()} numbers, which are too narrow for it to pay"
        return reason

    def library(self) -> ctypes.CDLL:
        """The functions. Raises BuildError where the kernel is unavailable."""
        library, reason = self._loaded
        if library is None:
            raise kernel_cache.BuildError(f"{self.source.name}: {reason}")
        return library

    def workspace(self, name: str, size: int) -> int:
        """Address of `size` floats of scratch memory of the calling thread: fresh pages cost more than the arithmetic.

        It is reused from call to call, starts at a multiple of 64 bytes and lies on large pages where the system has them.
        """
        held = getattr(self._buffers, name, None)
        if held is None or held.numel() < size + LARGE_PAGE // 4:
            held = torch.empty(size + LARGE_PAGE // 4, dtype=torch.float32, device="cpu")
            setattr(self._buffers, name, held)
            self.library().use_large_pages(_page_start(held), 4 * size)
        return _page_start(held)

    @cached_property
    def _loaded(self) -> tuple[ctypes.CDLL | None, str | None]:
        if os.environ.get(VARIABLE) == "off":
            return None, f"switched off by {VARIABLE}=off"
        try:
            library = kernel_cache.load(self.source)
            library.use_large_pages.argtypes, library.use_large_pages.restype = [ctypes.c_void_p, ctypes.c_int64], None
            self.declare(library)
        except (
            kernel_cache.BuildError,
            OSError,
            AttributeError,
        ) as error:  # AttributeError: a function that is not there
            return None, shown(error, 400)
        return library, None


@lru_cache(maxsize=1)
def openmp() -> int | None:
    """Address of the entry point of the process's OpenMP runtime that runs a function on its threads, or None."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None


def _page_start(held: Tensor) -> int:
    return -(-held.data_ptr() // LARGE_PAGE) * LARGE_PAGE
