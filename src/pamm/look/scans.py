"""The scan orders, drawn as curves over the token grid (`pamm look scans`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pamm.drawing.figure import TILE, Block, Tile, compose
from pamm.look import LookError
from pamm.nn.serialize import CURVES, MOST_ORDERS, row_column_orders, scan_orders
from pamm.tasks.pictures import colour_map

CROSS = "cross"
"""Name of MTMamba's cross-scan here: row by row, column by column, and both backwards."""

KNOWN = (*CURVES, CROSS)
"""Every scan that can be drawn."""

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
"""What each order of a curve is; turns are counter-clockwise."""

FINE = 4
"""Curves are drawn this many times larger and shrunk, since Pillow's lines have hard edges."""

JUMP, GRID, END = (226, 106, 90), (225, 225, 225), (60, 60, 60)
"""Colours of a step to a token that is no neighbour, of the grid's lines, and of the ring around the last token."""

MARGIN = 5
"""White around a scan's grid, pixels: room for the marks of its first and last token."""


def orders_of(curve: str, height: int, width: int, count: int = 4) -> np.ndarray:
    """The first `count` orders of a curve or of "cross" over a height×width grid: (count, height·width) int64.

    Row-major positions in the order in which the scan visits them (paper eq. 17). Raises LookError.
    """
    if curve not in KNOWN:
        raise LookError(f"unknown scan curve '{curve}'; choose among {', '.join(KNOWN)}")
    if not (1 <= height <= LARGEST and 1 <= width <= LARGEST):
        raise LookError(f"a grid of {height} x {width} tokens: expected sides of 1 to {LARGEST}, e.g. --grid 32 32")
    most = len(LINES) if curve == CROSS else MOST_ORDERS[curve]
    if not 1 <= count <= most:
        raise LookError(f"found {count} orders, expected 1 to {most} for '{curve}'")
    if curve == CROSS:
        return row_column_orders(height, width)[:count].numpy()
    return scan_orders(curve, height, width, count).numpy()


def name_of(curve: str, number: int) -> str:
    """What order `number` (from 0) of a curve is, e.g. "90°"."""
    names = NAMES.get(curve, ())
    return names[number] if number < len(names) else f"order {number + 1}"


def jumps(order: np.ndarray, width: int) -> int:
    """How often a scan of a map of this width goes on at a token that is no neighbour of the one before."""
    steps = np.abs(np.diff(order // width)) + np.abs(np.diff(order % width))
    return int((steps != 1).sum())


def draw_scan(order: np.ndarray, height: int, width: int, *, side: int = TILE) -> Image.Image:
    """One order (height·width,) as a curve through the tokens' centres; `side`: the longer side in pixels, about.

    Colour runs with the sequence from dark (first) to bright (last); a disc marks the first token, a ring the last. Steps
    to a token that is no neighbour are thin grey lines. Raises LookError unless the order visits every token once.
    """
    order = np.asarray(order)
    if not np.array_equal(np.sort(order), np.arange(height * width)):
        raise LookError(f"expected an order that visits each of {height} x {width} tokens once, found another sequence")
    cell = cell_side(height, width, side)
    fine, margin = cell * FINE, MARGIN * FINE
    picture = Image.new("RGB", (width * fine + 2 * margin, height * fine + 2 * margin), "white")
    pen = ImageDraw.Draw(picture)
    if cell >= 8:
        for x in range(width + 1):
            pen.line((margin + x * fine, margin, margin + x * fine, margin + height * fine), GRID, FINE // 2)
        for y in range(height + 1):
            pen.line((margin, margin + y * fine, margin + width * fine, margin + y * fine), GRID, FINE // 2)
    points = [(margin + (p % width + 0.5) * fine, margin + (p // width + 0.5) * fine) for p in order.tolist()]
    colours = [tuple(colour) for colour in rank_colours(len(points)).tolist()]
    steps = list(zip(points, points[1:], colours, strict=False))
    is_near = [abs(a[0] - b[0]) + abs(a[1] - b[1]) < 1.5 * fine for a, b, _ in steps]
    for (a, b, _), near in zip(steps, is_near, strict=True):
        if not near:
            pen.line((a, b), JUMP, max(FINE, fine // 14))
    for (a, b, colour), near in zip(steps, is_near, strict=True):
        if near:
            pen.line((a, b), colour, max(FINE, fine // 4))
    for point, colour in zip(points, colours, strict=True):
        _disc(pen, point, max(FINE, fine // 4) / 2, fill=colour)
    radius = max(0.9 * margin, 0.32 * fine)
    _disc(pen, points[0], radius, fill=colours[0])
    _disc(pen, points[-1], radius, fill="white", outline=END, width=round(radius / 4))
    return picture.resize((picture.width // FINE, picture.height // FINE), Image.Resampling.LANCZOS)


def cell_side(height: int, width: int, side: int) -> int:
    """Pixels of a token in the picture of a scan whose longer side is to be about `side`; at least 4."""
    return max(4, side // max(height, width))


def rank_colours(length: int) -> np.ndarray:
    """(length, 3) uint8: the colour of every token of a scan, dark violet first and yellow-green last."""
    return colour_map(np.linspace(0, 0.93, length)[None])[0]


def scan_figure(
    curves: Sequence[str], grid: tuple[int, int], *, count: int = 4, tile: int = TILE
) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """One row per curve, one column per order, and the orders drawn, curve → (count, L). Raises LookError."""
    height, width = grid
    orders = {curve: orders_of(curve, height, width, count) for curve in curves}
    rows = {}
    for curve, lines in orders.items():
        tiles = {}
        for k, order in enumerate(lines):
            far = jumps(order, width)
            note = f"{name_of(curve, k)}; {far} jump{'' if far == 1 else 's'}"
            tiles[f"order {k + 1}"] = Tile(draw_scan(order, height, width, side=tile), note)
        rows[curve] = tiles
    caption = (
        f"Scan orders over {height} x {width} tokens. Colour runs from the first token (dark, disc) to the last (bright, "
        "ring); thin red lines are jumps to a token that is no neighbour. "
    )
    if {"hilbert", "morton"} & set(curves):
        caption += "Hilbert and Morton curves are turned counter-clockwise and cropped from the covering power of two. "
    if {"snake-released", "morton-released"} & set(curves):
        caption += "Released curves are turned and cropped likewise from the square of the grid's longer side."
    return compose([Block(rows)], caption=caption, tile=tile), orders


def _disc(pen: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float, **style: object) -> None:
    pen.ellipse((centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius), **style)
