"""Where no C kernel runs: without a compiler, with a broken one, and switched off."""

from __future__ import annotations

import re

import pytest

from c_kernels import in_fresh_process


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no C compiler 'no-such-compiler' found; install gcc or clang"),
        ("false", "'false .*' failed"),
    ],
    ids=["absent", "broken"],
)
def test_without_a_compiler_the_step_engine_runs(compiler, reason, tmp_path):
    code = "print(choose('cpu', torch.float32), explain()[0])"
    printed = in_fresh_process(
        "test_selective_scan", code, CC=compiler, XDG_CACHE_HOME=str(tmp_path), PAMM_KERNELS="on"
    )
    assert printed.startswith("step ")
    assert re.search(reason, printed)


def test_kernels_can_be_switched_off():
    code = (
        "from pamm.kernels import attention, head, matrix, mixed_convolution, winograd\n"
        "modules = attention, head, matrix, mixed_convolution, winograd\n"
        "print(*(m.KERNEL.unavailable() for m in modules), choose('cpu', torch.float32), sep='; ')"
    )
    printed = in_fresh_process("test_selective_scan", code, PAMM_KERNELS="off").strip()
    assert printed == "; ".join(["switched off by PAMM_KERNELS=off"] * 5 + ["step"])
