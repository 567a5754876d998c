"""Shared fixtures."""

import sys
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
def kernels(request, monkeypatch) -> None:
    """Runs a test as users predict with a small network, and with the C kernels that only large layers use."""
    from pamm.ops import attention, winograd

    if request.param:
        monkeypatch.setattr(attention, "BY_CONVOLUTION", True)
        monkeypatch.setattr(attention, "SMALLEST", 1)
        monkeypatch.setattr(attention, "FEWEST_QUERIES", 1)
        monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 1)
        monkeypatch.setattr(winograd, "FEWEST_TILES", 1)
