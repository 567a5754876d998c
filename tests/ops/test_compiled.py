"""Where no C kernel runs: without a compiler, with a broken one, and switched off."""

from __future__ import annotations

import pytest
import torch

from pamm.kernels import head, matrix, mixed_convolution, winograd
from pamm.ops.compiled import Kernel
from pamm.ops.selective_scan import choose, explain, native


@pytest.fixture
def in_new_process(monkeypatch, tmp_path) -> None:
    """Every kernel as one that was not asked for yet, with an empty cache."""
    for module in (native, head, matrix, mixed_convolution, winograd):
        monkeypatch.setattr(module, "KERNEL", Kernel(module.KERNEL.source, module.KERNEL.declare))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PAMM_KERNELS", "on")


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no C compiler 'no-such-compiler' found; install gcc or clang"),
        ("false", "' failed"),
    ],
    ids=["absent", "broken"],
)
def test_without_a_compiler_the_step_engine_runs(compiler, reason, in_new_process, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    assert choose("cpu", torch.float32) == "step"
    assert reason in explain()[0].reason and compiler in explain()[0].reason


def test_kernels_can_be_switched_off(in_new_process, monkeypatch):
    monkeypatch.setenv("PAMM_KERNELS", "off")
    for module in (head, matrix, mixed_convolution, winograd):
        assert module.KERNEL.unavailable() == "switched off by PAMM_KERNELS=off"
    assert choose("cpu", torch.float32) == "step"
