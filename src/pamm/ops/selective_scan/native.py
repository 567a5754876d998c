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

from pamm.ops.selective_scan.inputs import Inputs

SOURCE = Path(__file__).with_name("scan.c")
INCLUDED = ("scan_vector.h", "scan_problem.h", "scan_forward.h", "scan_backward.h")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
NATIVE = ("-march=native", "-mcpu=native")
"""Flags for this very processor; the first that the compiler takes is used."""
JOBS = 32
"""Backward jobs to aim at; fixed, so that results do not depend on the number of threads."""
PARTS_LIMIT = 2**26
"""Bytes that the jobs' own gradients of B and C may take beyond one job per image."""
LARGE_PAGE = 2**21

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
        self.library = _load()[0]
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
        return self.array(name, torch.empty(shape, dtype=dtype))

    def reserve_parts(self) -> None:
        """Split the channels of one image into slices: as many jobs as are worth their memory."""
        problem, lanes = self.problem, self.library.scan_lanes()
        bytes_each = 4 * self.library.scan_parts(ctypes.byref(problem))
        wanted = -(-JOBS // (problem.groups * problem.images))
        problem.slices = max(1, min(-(-problem.channels // lanes), wanted, PARTS_LIMIT // bytes_each))
        problem.parts = _workspace("parts", self.library.scan_parts(ctypes.byref(problem)))

    def run(self) -> None:
        threads = torch.get_num_threads()
        self.problem.work = _workspace("work", threads * self.library.scan_workspace(self.problem.length))
        self.library.scan_run(ctypes.byref(self.problem), threads, _openmp())


@lru_cache(maxsize=1)
def _openmp() -> int | None:
    """Address of the entry point of the process's OpenMP runtime that runs a function on its threads, or None."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None


_buffers = threading.local()


def _workspace(name: str, size: int) -> int:
    """Address of `size` floats of scratch memory of the calling thread: fresh pages cost more than the arithmetic.

    It is reused from call to call and lies on large pages where the system has them.
    """
    held = getattr(_buffers, name, None)
    if held is None or held.numel() < size + LARGE_PAGE // 4:
        held = torch.empty(size + LARGE_PAGE // 4, dtype=torch.float32, device="cpu")
        setattr(_buffers, name, held)
        _load()[0].scan_use_large_pages(_page_start(held), 4 * size)
    return _page_start(held)


def _page_start(held: Tensor) -> int:
    return -(-held.data_ptr() // LARGE_PAGE) * LARGE_PAGE


# -- building ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The kernel, compiled if need be, and why there is none."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (_BuildError, OSError) as error:
        return None, str(error)
    library.scan_workspace.argtypes, library.scan_workspace.restype = [ctypes.c_int64], ctypes.c_int64
    library.scan_parts.argtypes, library.scan_parts.restype = [ctypes.POINTER(_Problem)], ctypes.c_int64
    library.scan_use_large_pages.argtypes, library.scan_use_large_pages.restype = (
        [ctypes.c_void_p, ctypes.c_int64],
        None,
    )
    library.scan_run.argtypes, library.scan_run.restype = (
        [ctypes.POINTER(_Problem), ctypes.c_int, ctypes.c_void_p],
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
    sources = [SOURCE.with_name(name).read_text() for name in (SOURCE.name, *INCLUDED)]
    key = hashlib.sha256("\0".join([*sources, *compiler, *FLAGS, version, _processor()]).encode()).hexdigest()
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
