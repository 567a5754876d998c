"""Shared fixtures."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "benchmarks")]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the checkout with data/, photographs that may not be shipped; without it the test skips."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED.name}/ beside the checkout: its photographs and labels are needed here")
    return SHARED


class Form:
    """The way a test runs a network; `called` holds the names of the kernels' operators that were called."""

    def __init__(self, name: str):
        self.name = name
        self.called: list[str] = []

    def __call__(self, model, *, training: bool = False):
        """The network itself, with its modules replaced unless the form is "plain"."""
        from pamm.kernels import accelerate

        if self.name != "plain":
            accelerate(model, training=training)
        return model


@pytest.fixture(params=["plain", "accelerated", "every kernel"])
def form(request, monkeypatch) -> Iterator[Form]:
    """Runs a test with a network as it is, as users run a small one, and with the C kernels that only large layers use."""
    import torch

    from pamm.kernels import matrix, winograd

    found = Form(request.param)
    if request.param == "every kernel":
        monkeypatch.setattr(matrix, "SLOW_PRODUCTS", True)
        for module, limits in (
            (matrix, ("SMALLEST", "SMALLEST_WEIGHT", "FEWEST_ROWS")),
            (winograd, ("FEWEST_CHANNELS", "FEWEST_TILES")),
        ):
            for limit in limits:
                monkeypatch.setattr(module, limit, 1)
    operators = {
        "convolution_3x3": winograd.kernel_convolution,
        "product": matrix.kernel_product,
    }
    for name, own in operators.items():

        def note(*tensors, name=name, own=own):
            found.called.append(name)
            return own(*tensors)

        monkeypatch.setattr(torch.ops.pamm, name, note)
    yield found
    assert found.name == "every kernel" or not found.called, "a kernel was used for a small layer"
    if found.name == "every kernel" and matrix.objection() is None:
        assert "product" in found.called, "no kernel was used"
