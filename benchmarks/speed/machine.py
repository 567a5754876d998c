"""The machine a measurement ran on: what it is, and the most it can do."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pamm

GPU_LANES, GPU_EXPONENTIALS = 128, 16
"""Fused multiply-adds and exponentials that one multiprocessor of an NVIDIA GPU issues per clock."""

ROUNDS, TRIES = {"multiply_adds": 20_000_000, "exponentials": 400_000}, 5
"""Rounds of the functions of rates.c, some 50 ms each; the best of so many tries is what the machine can do."""


def describe() -> dict[str, Any]:
    """Processor, cores, memory in bytes, GPU or None, versions, commit or None, time."""
    import torch

    names = [
        line.split(":", 1)[1].strip()
        for line in _lines("/proc/cpuinfo")
        if line.startswith(("model name", "cpu model"))
    ]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "matrix_units": "amx_tile" in " ".join(_lines("/proc/cpuinfo")[:60]),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _meminfo("MemTotal"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "pamm": version("pamm"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    code = [str(Path(pamm.__file__).parent), str(folder / "*.py")]
    try:
        found, changed = (
            subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
            for arguments in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--", *code])
        )
    except OSError:
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "") if found.returncode == 0 else None


def free_memory() -> int | None:
    """Bytes that processes may still take: of the machine, or of the container where that is less. None: unknown."""
    free = [value for value in [_meminfo("MemAvailable")] if value is not None]
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].strip().isdigit():
        free.append(int(limit[0]) - int(used[0]))
    return min(free) if free else None


def process_memory(name: str) -> int:
    """VmRSS (resident now) or VmHWM (the most that ever was) of this process, bytes; 0 where the system does not tell."""
    found = [line for line in _lines("/proc/self/status") if line.startswith(f"{name}:")]
    return 1024 * int(found[0].split()[1]) if found else 0


def give_back() -> None:
    """Return freed memory to the system and begin VmHWM anew, so that both tell of what follows. Does nothing outside Linux."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _meminfo(name: str) -> int | None:
    found = [line for line in _lines("/proc/meminfo") if line.startswith(f"{name}:")]
    return 1024 * int(found[0].split()[1]) if found else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


# -- rates ---------------------------------------------------------------------------------------------------------------


def product_rates(device: str, dtype: str) -> dict[str, float]:
    """Operations per second (2 per multiply-add) of a large matrix product and of a wide 3×3 convolution, the best of several.

    `gemm` is the larger of the two: on some processors one library is much slower than the other.
    """
    import torch
    import torch.nn.functional as F

    side, maps = (8192, 64) if device == "cuda" else (2048, 1)
    kind = getattr(torch, dtype)
    a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    x, w = torch.randn(maps, 1024, 32, 32, device=device), torch.randn(1024, 1024, 3, 3, device=device)
    x, w = x.to(kind), w.to(kind)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.inference_mode():
        found = {
            "matrix": 2 * side**3 / _least_seconds(lambda: (a @ b, wait())),
            "convolution": 18 * 1024**2 * x[:, 0].numel() / _least_seconds(lambda: (F.conv2d(x, w, padding=1), wait())),
        }
    return found | {"gemm": max(found.values())}


def copy_rate(device: str) -> float:
    """Bytes per second, read plus written, of a copy larger than the caches, the best of several."""
    import torch

    source = torch.ones(1 << 28 if device == "cuda" else 1 << 26, device=device)
    target = torch.empty_like(source)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return 2 * source.nbytes / _least_seconds(lambda: (target.copy_(source), wait()))


def _least_seconds(work: Callable[[], Any], calls: int = 15) -> float:
    work()
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def vector_rates(threads: int) -> dict[str, float] | None:
    """Fused multiply-adds and polynomial exponentials (degree 5) per second on `threads` threads; None without a compiler."""
    with tempfile.TemporaryDirectory(prefix="pamm-") as folder:
        target = Path(folder) / "rates.so"
        compiler = shlex.split(os.environ.get("CC", "cc"))
        command = [*compiler, "-O3", "-march=native", "-shared", "-fPIC", "-Wno-psabi", "-o", str(target)]
        try:
            subprocess.run([*command, str(Path(__file__).with_name("rates.c"))], check=True, capture_output=True)
            library = ctypes.CDLL(str(target))
        except (OSError, subprocess.CalledProcessError):
            return None
        return {
            name: max(_threaded_rate(getattr(library, name), threads, rounds) for _ in range(TRIES))
            for name, rounds in ROUNDS.items()
        }


def _threaded_rate(function: Any, threads: int, rounds: int) -> float:
    """Lane operations per second of a C function that every thread runs once (ctypes lets them run together)."""
    function.argtypes, function.restype = [ctypes.c_int64, ctypes.POINTER(ctypes.c_float)], ctypes.c_int64
    done = [0] * threads

    def work(index: int) -> None:
        done[index] = function(rounds, (ctypes.c_float * 1)(0.001))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - start)


def scan_floor(steps: float, orders: int, shared: bool, moved: float, device: str, threads: int) -> dict[str, Any]:
    """The least time a forward scan can take here, from rates measured now; {} where they cannot be.

    steps: state-steps B·D·N·L·orders; moved: bytes of inputs and output. A state-step costs three vector operations and one
    exponential, which orders with common parameters share on a CPU. On a CPU both issue from the same units, so their times
    add; on a GPU exponentials have units of their own, and the largest of exponentials, operations and bytes bounds.
    """
    if device == "cuda":
        import torch

        found = torch.cuda.get_device_properties(0)
        clock = 1000 * getattr(found, "clock_rate", 0) * found.multi_processor_count
        if not clock:
            return {}
        parts = {
            "operations": 3 * steps / (clock * GPU_LANES),
            "exponentials": steps / (clock * GPU_EXPONENTIALS),
            "bytes": moved / copy_rate(device),
        }
        return {"seconds": max(parts.values()), "parts": parts, "clock": found.clock_rate}
    rates = vector_rates(threads)
    if rates is None:
        return {}
    exponentials = steps / orders if shared else steps
    seconds = 3 * steps / rates["multiply_adds"] + exponentials / rates["exponentials"]
    return {"seconds": seconds, "rates": rates}
