"""Shared fixtures."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference outputs and real images beside the checkout; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED.name}/ beside the checkout: its golden outputs and real images are needed here")
    return SHARED


@pytest.fixture(params=[False, True], ids=["as it comes", "every kernel"])
def kernels(request, monkeypatch) -> Iterator[list[str]]:
    """Runs a test as users predict with a small network, and with the C kernels that only large layers use.

    Holds the names of the kernels' operators that were called.
    """
    import torch

    from pamm.ops import attention, winograd

    if request.param:
        monkeypatch.setattr(attention, "BY_CONVOLUTION", True)
        monkeypatch.setattr(attention, "SMALLEST", 1)
        monkeypatch.setattr(attention, "FEWEST_QUERIES", 1)
        monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 1)
        monkeypatch.setattr(winograd, "FEWEST_TILES", 1)
    called = []
    for name, own in (("convolution_3x3", winograd.kernel_convolution), ("attention", attention.kernel_attention)):

        def note(*tensors: torch.Tensor, name=name, own=own) -> torch.Tensor | tuple[torch.Tensor, ...]:
            called.append(name)
            return own(*tensors)

        monkeypatch.setattr(torch.ops.pamm, name, note)
    yield called
    if winograd.objection() is None and request.param and "mtmamba_nyud" not in request.node.name:
        assert called, "no kernel was used"  # MTMamba has no 3×3 convolution with these golden outputs
