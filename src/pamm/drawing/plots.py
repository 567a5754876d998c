"""Plots by matplotlib, an extra: figures of a size in pixels, with letters that grow with it."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from pamm import PammError
from pamm.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100


class PlotError(PammError, ImportError):
    """No plot can be drawn; the message gives the remedy."""


def check_plots() -> None:
    """Raise PlotError if matplotlib is not installed. Call it before any work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError("this figure needs matplotlib: pip install 'pamm[plots]'") from None


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of about width × height pixels; `save_figure` cuts off what its axes leave empty. Raises PlotError."""
    check_plots()
    from matplotlib.figure import Figure

    return Figure((width / DPI, height / DPI), dpi=DPI, layout="constrained")


def points(pixels: float) -> float:
    """Pixels of a figure in the points that matplotlib measures letters and lines in."""
    return pixels * 72 / DPI


def set_caption(figure: Figure, text: str, size: float) -> None:
    """A text below a figure, `size` pixels high, wrapped at the figure's width; the figure grows by its lines."""
    lines = wrap(text, int(figure.get_figwidth() * DPI / (0.5 * size)))
    figure.set_figheight(figure.get_figheight() + 1.4 * size * len(lines) / DPI)
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=points(size), color="dimgrey")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG or an SVG, whole or not at all; the same figure gives the same bytes."""
    import matplotlib

    kind = path.suffix[1:]
    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[kind]
    with replacing(path) as new, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pamm"}):
        figure.savefig(new, format=kind, bbox_inches="tight", pad_inches=0.08, metadata=metadata)
