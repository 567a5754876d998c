"""Vectors of neighbouring channels in C: a part of a vector is read and written, and no number beyond it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from pamm.ops import compiled
from pamm.ops.compiled import Kernel

SOURCE = f"""
#include "{Path(compiled.__file__).with_name("jobs.h")}"
void copy(const void *from, void *to, int64_t width, int64_t half) {{
    store_channels(to, 0, width, half, load_channels(from, 0, width, half));
}}
"""


def declare(library: ctypes.CDLL) -> None:
    library.copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.copy.restype = None


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Kernel:
    source = tmp_path_factory.mktemp("vector") / "copy.c"
    source.write_text(SOURCE)
    made = Kernel(source, declare)
    if made.unavailable():
        pytest.skip(made.unavailable())
    return made


@pytest.mark.parametrize("width", [-3, 0, 1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_a_vector(kernel, dtype, width):
    lanes = kernel.library().vector_lanes()
    given, found = torch.arange(1, 17).to(dtype), torch.zeros(16, dtype=dtype)
    kernel.library().copy(given.data_ptr(), found.data_ptr(), width, dtype == torch.bfloat16)
    present = max(0, min(width, lanes))
    assert torch.equal(found[:present], given[:present])
    assert not found[present:].any()
