"""The selective scan as a C kernel for CPUs, compiled on first use with the system's C compiler and kept in a cache folder.

The kernel needs no header of torch and no OpenMP: it is called through ctypes with data pointers and runs on
`torch.get_num_threads()` threads: those of the OpenMP runtime that torch has loaded, or POSIX threads where it has none.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from pamm.ops.selective_scan import around

SOURCE = Path(__file__).with_name("scan.c")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
NATIVE = ("-march=native", "-mcpu=native")
"""Flags for this very processor; the first that the compiler takes is used."""
JOBS = 32
"""Backward jobs to aim at; fixed, so that results do not depend on the number of threads."""

_INTEGERS = ("images", "groups", "orders_count", "sets", "length", "channels", "states", "slices")
_POINTERS = ("x", "delta", "A", "B", "C", "dy", "orders", "y", "dx", "ddelta", "dA", "dB", "dC", "work")


class _Problem(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _INTEGERS] + [(name, ctypes.c_void_p) for name in _POINTERS]


class _BuildError(RuntimeError):
    """Why the kernel could not be built."""


def unavailable() -> str | None:
    """Why this engine cannot run on this machine, or None. The first call compiles the kernel."""
    return _load()[1]


def refuses(device: str, dtype: torch.dtype) -> str | None:
    """Why this engine does not take inputs on this kind of device and of this dtype, or None."""
    if device != "cpu":
        return f"the C kernel runs on the CPU, the inputs are on {device}"
    if dtype == torch.float64:
        return "the C kernel computes in float32, the inputs are float64"
    return None


def describe() -> str:
    return f"C kernel for the CPU, {_load()[0].scan_lanes()} channels per vector, {torch.get_num_threads()} threads"


def kept(x: Tensor, A: Tensor, orders: Tensor, keep: bool) -> Tensor:
    """Nothing is kept: the backward pass recomputes the states."""
    return A.new_empty(0)


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    orders: Tensor,
    softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Contract: see `pamm.ops.selective_scan`."""
    return around.forward(_scan, x, delta, A, B, C, D, delta_bias, orders, softplus, keep)


def _scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, orders: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """The bare recurrence in float32 → y (G, B, L, D), nothing."""
    y = x.new_empty(x.shape)
    _run(1, y=y, x=x, delta=delta, A=A, B=B, C=C, orders=orders)
    return y, kept(x, A, orders, keep)


def backward(
    dy: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    orders: Tensor,
    softplus: bool,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    """Contract: see `pamm.ops.selective_scan`."""
    return around.backward(_scan_backward, dy, x, delta, A, B, C, D, delta_bias, orders, softplus, kept)


def _scan_backward(
    dy: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, orders: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, A, B and C from that of y, (G, B, L, D)."""
    G, images, _, channels = x.shape
    blocks = -(-channels // _load()[0].scan_lanes())
    slices = min(blocks, -(-JOBS // (G * images)))
    dx, ddelta = x.new_empty(x.shape), x.new_empty(delta.shape)
    dA = x.new_empty(G, images, *A.shape[1:])
    dB, dC = x.new_zeros(slices, *B.shape), x.new_zeros(slices, *C.shape)
    given = {"dy": dy, "x": x, "delta": delta, "A": A, "B": B, "C": C, "orders": orders}
    _run(slices, **given, dx=dx, ddelta=ddelta, dA=dA, dB=dB, dC=dC)
    return dx, ddelta, dA.sum(1), dB.sum(0), dC.sum(0)


def _run(slices: int, **tensors: Tensor) -> None:
    """Call the kernel; the tensors that it fills must be contiguous."""
    library = _load()[0]
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    tensors["orders"] = tensors["orders"].int()
    G, images, length, channels = tensors["x"].shape
    count = len(tensors["orders"])
    sets = count if tensors["delta"].dim() == 5 else 1
    threads = torch.get_num_threads()
    tensors["work"] = _workspace(threads * library.scan_workspace(length))
    sizes = (G * images, G, count, sets, length, channels, tensors["A"].shape[-1], slices)
    problem = _Problem(*sizes, **{name: tensor.data_ptr() for name, tensor in tensors.items()})
    library.scan_run(ctypes.byref(problem), threads, _openmp())


@lru_cache(maxsize=1)
def _openmp() -> int | None:
    """Address of the entry point of the process's OpenMP runtime that runs a function on its threads, or None."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None


_buffers = threading.local()


def _workspace(size: int) -> Tensor:
    """Scratch memory of the calling thread, reused from call to call: fresh pages cost more than the arithmetic."""
    held = getattr(_buffers, "work", None)
    if held is None or held.numel() < size:
        held = _buffers.work = torch.empty(size, dtype=torch.float32, device="cpu")
    return held


# -- building ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The kernel, compiled if need be, and why there is none."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (_BuildError, OSError) as error:
        return None, str(error)
    library.scan_workspace.argtypes, library.scan_workspace.restype = [ctypes.c_int64], ctypes.c_int64
    library.scan_run.argtypes, library.scan_run.restype = (
        [
            ctypes.POINTER(_Problem),
            ctypes.c_int,
            ctypes.c_void_p,
        ],
        None,
    )
    return library, None


def _built() -> Path:
    """Path of the shared library, from the cache or freshly compiled. Raises _BuildError."""
    if os.name != "posix":
        raise _BuildError(f"the C kernel needs POSIX threads, this is {platform.system()}")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise _BuildError(f"no C compiler '{' '.join(compiler)}' found; install gcc or clang, or set CC")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256("\0".join([SOURCE.read_text(), *compiler, *FLAGS, version, _processor()]).encode()).hexdigest()
    target = _cache() / f"scan-{key[:20]}.so"
    if not target.exists():
        _compile(compiler, target)
    return target


def _compile(compiler: list[str], target: Path) -> None:
    """Compile in a folder of this call's own, then rename: another process sees a whole library or none."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        for native in (*NATIVE, None):
            command = [*compiler, *FLAGS, *([native] if native else []), "-o", str(made), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                made.replace(target)
                return
    lines = done.stderr.strip().splitlines() or ["no message"]
    raise _BuildError(f"'{shlex.join(command)}' failed: {next((line for line in lines if 'error' in line), lines[0])}")


def _processor() -> str:
    """What tells processors with different instructions apart: a home folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = (line for line in lines if line.lower().startswith(("flags", "features", "model name", "cpu part")))
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(flags))])


@lru_cache(maxsize=1)
def _private_folder() -> tempfile.TemporaryDirectory:
    """A folder for this process alone, removed at its end."""
    return tempfile.TemporaryDirectory(prefix="pamm-")


def _cache() -> Path:
    """The user's cache folder, or a temporary one where that cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pamm"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return Path(_private_folder().name)
    return folder if os.access(folder, os.W_OK) else Path(_private_folder().name)
