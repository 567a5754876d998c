"""The scan orders, drawn as curves over the token grid (`pamm look scans`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pamm.drawing.layout import TILE
from pamm.drawing.plots import new_figure, points, set_caption
from pamm.look import LookError
from pamm.nn.serialize import CURVES, MOST_ORDERS, row_column_orders, scan_orders
from pamm.tasks.pictures import colour_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CROSS = "cross"
"""Name of MTMamba's cross-scan here: row by row, column by column, and both backwards."""

LARGEST = 256
"""Longest side of a grid, tokens."""

TURNS = ("0°", "90°", "180°", "270°")
LINES = ("rows", "columns", "rows, backwards", "columns, backwards")
NAMES = {
    "hilbert": (*TURNS, *(f"{turn}, backwards" for turn in TURNS)),
    "hilbert-bottom-left": (*TURNS, *(f"{turn}, backwards" for turn in TURNS)),
    "morton": (*TURNS, *(f"mirrored, {turn}" for turn in TURNS)),
    "snake": (*LINES, *(f"mirrored {line}" for line in LINES)),
    "snake-released": TURNS,
    "morton-released": TURNS,
    CROSS: LINES,
}
"""Name of each order of a curve; turns are counter-clockwise."""

SMALLEST_CELL = 4
"""Pixels of a token at least, however many tokens a grid has."""

JUMP, GRID = "#e26a5a", "#e1e1e1"
"""Colours of a step to a token that is no neighbour, and of the grid's lines."""


def orders_of(curve: str, height: int, width: int, count: int = 4) -> np.ndarray:
    """The first scan orders of a curve, or of "cross", over a grid of tokens (paper eq. 17).

    Args:
        curve: name of a curve.
        height: rows of tokens.
        width: columns of tokens.
        count: number of orders.

    Returns:
        (count, height·width) int64: row-major positions in the order of the scan.

    Raises:
        LookError: an unknown curve, or a grid or count that it does not have.
    """
    if curve not in (*CURVES, CROSS):
        raise LookError(f"unknown scan curve '{curve}'; choose among {', '.join((*CURVES, CROSS))}")
    if not (1 <= height <= LARGEST and 1 <= width <= LARGEST):
        raise LookError(f"a grid of {height} x {width} tokens: expected sides of 1 to {LARGEST}, e.g. --grid 32 32")
    most = len(LINES) if curve == CROSS else MOST_ORDERS[curve]
    if not 1 <= count <= most:
        raise LookError(f"found {count} orders, expected 1 to {most} for '{curve}'")
    if curve == CROSS:
        return row_column_orders(height, width)[:count].numpy()
    return scan_orders(curve, height, width, count).numpy()


def name_of(curve: str, number: int) -> str:
    """Name of order `number` (from 0) of a curve, e.g. "90°"."""
    names = NAMES.get(curve, ())
    return names[number] if number < len(names) else f"order {number + 1}"


def jumps(order: np.ndarray, width: int) -> int:
    """How often a scan of a map of this width goes on at a token that is no neighbour of the one before."""
    steps = np.abs(np.diff(order // width)) + np.abs(np.diff(order % width))
    return int((steps != 1).sum())


def draw_scan(axes: Axes, order: np.ndarray, height: int, width: int, *, cell: float = 15) -> None:
    """Draw one scan order as a curve through the tokens, which lie at whole x and y; y grows downwards.

    The colour runs along the sequence from dark (first) to bright (last). A disc marks the first token, a ring the last. Steps
    to a token that is no neighbour are thin red lines.

    Args:
        axes: matplotlib's axes to draw into.
        order: (height·width,) row-major positions in the order of the scan.
        height: rows of tokens.
        width: columns of tokens.
        cell: size of a token, pixels; the lines' widths follow it.

    Raises:
        LookError: the order does not visit every token once.
    """
    order = np.asarray(order)
    if not np.array_equal(np.sort(order), np.arange(height * width)):
        raise LookError(f"expected an order that visits each of {height} x {width} tokens once, found another sequence")
    from matplotlib.collections import LineCollection

    x, y = order % width, order // width
    steps = np.stack([np.stack([x[:-1], y[:-1]], 1), np.stack([x[1:], y[1:]], 1)], 1)
    near = np.abs(np.diff(x)) + np.abs(np.diff(y)) == 1
    colours, cell = rank_colours(len(order)) / 255, points(cell)
    line = max(1.0, cell / 4)
    axes.add_collection(LineCollection(list(steps[~near]), colors=JUMP, linewidths=max(0.7, cell / 14), zorder=2))
    axes.add_collection(LineCollection(list(steps[near]), colors=colours[:-1][near], linewidths=line, zorder=3))
    axes.scatter(x, y, line**2, colours, linewidths=0, zorder=3)
    mark = max(6.0, 0.64 * cell)
    axes.plot(x[0], y[0], "o", color=colours[0], markersize=mark, zorder=4, clip_on=False)
    ring = {"color": "white", "markeredgecolor": "#3c3c3c", "markeredgewidth": mark / 8, "clip_on": False}
    axes.plot(x[-1], y[-1], "o", markersize=mark, zorder=4, **ring)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
    if cell >= 5:
        axes.set_xticks(np.arange(width + 1) - 0.5)
        axes.set_yticks(np.arange(height + 1) - 0.5)
        axes.grid(color=GRID, linewidth=0.5)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    for spine in axes.spines.values():
        spine.set_color(GRID)


def rank_colours(length: int) -> np.ndarray:
    """(length, 3) uint8: the colour of every token of a scan, dark violet first and yellow-green last."""
    return colour_map(np.linspace(0, 0.93, length)[None])[0]


def scan_figure(
    curves: Sequence[str], grid: tuple[int, int], *, count: int = 4, tile: int = TILE
) -> tuple[Figure, dict[str, np.ndarray]]:
    """Draw scan orders, one row per curve and one column per order.

    Args:
        curves: names of curves.
        grid: rows and columns of tokens.
        count: number of orders of each curve.
        tile: longer side of a picture, pixels.

    Returns:
        The figure; and the orders, curve → (count, L).

    Raises:
        LookError: an unknown curve, or a grid or count that it does not have.
        PlotError: matplotlib is not installed.
    """
    height, width = grid
    orders = {curve: orders_of(curve, height, width, count) for curve in curves}
    text, cell = max(10, tile / 17), max(SMALLEST_CELL, tile / max(grid))
    panel = max(cell * width, 13 * text) + text, max(cell * height, 2 * text) + 3 * text
    figure = new_figure(count * panel[0] + 2 * text, len(orders) * panel[1] + 4 * text)
    rows = figure.subplots(len(orders), count, squeeze=False)
    for row, (curve, lines) in zip(rows, orders.items(), strict=True):
        row[0].set_ylabel(curve, fontsize=points(text))
        for k, (axes, order) in enumerate(zip(row, lines, strict=True)):
            draw_scan(axes, order, height, width, cell=cell)
            far = jumps(order, width)
            note = f"{name_of(curve, k)}; {far} jump{'' if far == 1 else 's'}"
            axes.set_xlabel(note, fontsize=points(0.8 * text), color="dimgrey")
    for k, axes in enumerate(rows[0], start=1):
        axes.set_title(f"order {k}", fontsize=points(text))
    caption = (
        f"Scan orders over {height} x {width} tokens. Colour runs from the first token (dark, disc) to the last (bright, "
        "ring); thin red lines are jumps to a token that is no neighbour. "
    )
    if {"hilbert", "morton"} & set(curves):
        caption += "Hilbert and Morton curves are turned counter-clockwise and cropped from the covering power of two. "
    if {"snake-released", "morton-released"} & set(curves):
        caption += "Released curves are turned and cropped likewise from the square of the grid's longer side."
    set_caption(figure, caption, max(9, tile / 20))
    return figure, orders
