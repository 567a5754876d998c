"""What the tests of C kernels share."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pamm.ops.compiled import Kernel

NARROWER = ["-mno-avx512f", "-mno-avx"]
"""Flags for vectors of 8 numbers (AVX2) and of 4 (SSE, NEON)."""

needs_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the compiler's flags are those of x86"
)


def in_fresh_process(module: str, code: str, **environment: str) -> str:
    """Run code after `from MODULE import *`, a test file's name, in another interpreter; returns its standard output."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    setting = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", **environment}
    command = [sys.executable, "-c", f"from {module} import *\n{code}"]
    done = subprocess.run(command, env=setting, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def not_yet_loaded(module: ModuleType, cache: Path, flag: str = "") -> Iterator[None]:
    """Inside, the C kernel of a module is as in a new process: it will be compiled, with a flag more, into an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "KERNEL", Kernel(module.KERNEL.source, module.KERNEL.declare))
        patch.setenv("CC", f"{os.environ.get('CC', 'cc')} {flag}")
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield
        assert sorted(path.suffix for path in (cache / "pamm" / "kernels").iterdir()) == [".sha256", ".so"]


def assert_same_bits_for_any_number_of_threads(run: Callable[[], Sequence[Tensor]]) -> None:
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(run())
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def assert_compiles_to_one_graph(function: Callable[..., Tensor], module: ModuleType, cache: Path) -> None:
    """A function without arguments, in which the module's kernel is loaded while the graph is made."""
    torch._dynamo.reset()
    with not_yet_loaded(module, cache), torch.no_grad():
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)()
        assert torch.equal(compiled, function())
