"""Figures of tiles in rows and columns: headings above, names at the left, legends and a caption below.

`tile`, the longer side of a picture in pixels, sets the scale: letters and gaps grow with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

Meaning = str | Mapping[str, Colour]
"""The meaning of colours: words, or names with a colour each."""

TILE = 240
"""Longer side of a picture, pixels, unless another is asked for."""

INK, SOFT, PALE = (0, 0, 0), (90, 90, 90), (238, 238, 238)
"""Colours of text, of secondary text, and of what is empty."""


@dataclass(frozen=True)
class Tile:
    """A picture and a note below it."""

    picture: Image.Image
    note: str = ""


@dataclass(frozen=True)
class Block:
    """Named rows of tiles by column, under a title."""

    rows: Sequence[tuple[str, Mapping[str, Tile]]]
    title: str = ""


class Scale:
    """Sizes that follow from a tile's side, pixels."""

    def __init__(self, tile: int = TILE):
        self.text = max(10, round(tile / 15))
        self.small = max(9, round(tile / 19))
        self.line = round(self.text * 1.35)
        self.gap = max(3, round(tile / 30))

    def shorten(self, text: str, width: int, *, small: bool = False) -> str:
        """The end of a text that is wider than `width`: the end of a path is more informative than its start."""
        size = self.small if small else self.text
        ends = (text, *("…" + text[i:] for i in range(1, len(text))))
        return next((end for end in ends if text_width(end, size) <= width), "")


def compose(
    blocks: Sequence[Block], *, legends: Mapping[str, Meaning] | None = None, caption: str = "", tile: int = TILE
) -> Image.Image:
    """Blocks under each other, columns of one name in one place. RGB.

    Args:
        legends: name → what its colours mean: classes with their colours, or words.
        caption: text below everything.

    Raises:
        ValueError: there is no tile at all.
    """
    scale = Scale(tile)
    widths: dict[str, int] = {}
    for column, shown in (item for block in blocks for _, row in block.rows for item in row.items()):
        widths[column] = max(widths.get(column, text_width(column, scale.text)), shown.picture.width)
    if not widths:
        raise ValueError("a figure needs at least one image")
    left = scale.line + scale.gap if any(name for block in blocks for name, _ in block.rows) else 0
    width = left + sum(widths.values()) + scale.gap * (len(widths) - 1)
    heading = {column: Image.new("RGB", (widths[column], scale.line), "white") for column in widths}
    for column, strip in heading.items():
        _write(strip, column, (strip.width / 2, scale.line / 2), scale.text, anchor="mm")
    strips = [_row("", heading, widths, left, scale)]
    for block in blocks:
        if block.title:
            strips.append(Image.new("RGB", (width, scale.line), "white"))
            _write(strips[-1], scale.shorten(block.title, width - left), (left, scale.line / 2), scale.text, fill=SOFT)
        for name, tiles in block.rows:
            strips.append(_row(name, {c: _noted(shown, scale) for c, shown in tiles.items()}, widths, left, scale))
    lines = [_flow(_items(meaning), width, scale, title=f"{name}:") for name, meaning in (legends or {}).items()]
    lines += [_flow(_items(caption), width, scale)] if caption else []
    strips += [_stack(lines, 0)] if lines else []
    return _stack(strips, scale.gap)


def empty_tile(size: tuple[int, int], text: str, *, tile: int = TILE) -> Image.Image:
    """A pale picture of (width, height) with a text in its middle, for a missing picture."""
    picture = Image.new("RGB", size, PALE)
    _write(picture, text, (size[0] / 2, size[1] / 2), Scale(tile).small, fill=SOFT, anchor="mm")
    return picture


def labelled_bar(colours: np.ndarray, low: str, high: str, *, text: int) -> Image.Image:
    """(W, 3) uint8 colours as a bar, with texts below its ends; as wide as they need."""
    width = len(colours)
    bar = Image.new("RGB", (width, 2 * text + text // 2 + 2), "white")
    bar.paste(Image.fromarray(np.ascontiguousarray(np.broadcast_to(colours, (text, width, 3)))))
    _write(bar, low, (0, text + 2), text, anchor="la")
    _write(bar, high, (width, text + 2), text, anchor="ra")
    return bar


def text_width(text: str, size: int) -> int:
    """Pixels that a line of text takes."""
    return int(_font(size).getlength(text)) + 1


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which every installation has."""
    return ImageFont.load_default(size)


def _write(
    picture: Image.Image, text: str, at: tuple[float, float], size: int, *, fill: Colour = INK, anchor: str = "lm"
) -> None:
    ImageDraw.Draw(picture).text(at, text, fill, font=_font(size), anchor=anchor)


def _row(
    name: str, pictures: Mapping[str, Image.Image], widths: Mapping[str, int], left: int, scale: Scale
) -> Image.Image:
    """The name, turned upright along the row's height, and the pictures, each in the middle of its column."""
    height = max(picture.height for picture in pictures.values())
    strip = Image.new("RGB", (left + sum(widths.values()) + scale.gap * (len(widths) - 1), height), "white")
    if name:
        label = Image.new("RGB", (height, scale.line), "white")
        _write(label, scale.shorten(name, height), (height / 2, scale.line / 2), scale.text, anchor="mm")
        strip.paste(label.rotate(90, expand=True), (0, 0))
    for column, width in widths.items():
        if column in pictures:
            strip.paste(pictures[column], (left + (width - pictures[column].width) // 2, 0))
        left += width + scale.gap
    return strip


def _noted(tile: Tile, scale: Scale) -> Image.Image:
    if not tile.note:
        return tile.picture
    note = Image.new("RGB", (tile.picture.width, scale.line), "white")
    text = scale.shorten(tile.note, note.width, small=True)
    _write(note, text, (note.width / 2, scale.line / 2), scale.small, fill=SOFT, anchor="mm")
    return _stack([tile.picture, note], 0)


def _items(meaning: Meaning) -> Iterable[tuple[str, Colour | None]]:
    return meaning.items() if isinstance(meaning, Mapping) else ((word, None) for word in meaning.split())


def _flow(items: Iterable[tuple[str, Colour | None]], width: int, scale: Scale, *, title: str = "") -> Image.Image:
    """Words, and names behind squares of their colours, wrapped at `width` and indented behind the title."""
    indent = text_width(title, scale.small) + scale.gap if title else 0
    places: list[tuple[int, int, str, Colour | None]] = [(0, 0, title, None)]
    x, line = indent, 0
    for text, colour in items:
        square = 0 if colour is None else scale.small + scale.gap // 2 + 2
        needed = square + text_width(text, scale.small)
        if x + needed > width and x > indent:
            x, line = indent, line + 1
        places.append((x, line, text, colour))
        x += needed + (round(scale.small / 4) if colour is None else 2 * scale.gap)
    strip = Image.new("RGB", (width, scale.line * (line + 1)), "white")
    for x, line, text, colour in places:
        middle = scale.line * (line + 0.5)
        if colour is not None:
            top = middle - scale.small / 2
            box = (x, top, x + scale.small, top + scale.small)
            ImageDraw.Draw(strip).rectangle(box, fill=colour, outline=SOFT)
            x += scale.small + scale.gap // 2 + 2
        _write(strip, text, (x, middle), scale.small, fill=INK if title else SOFT)
    return strip


def _stack(strips: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures under each other with a white margin of `gap` around them."""
    width = max(strip.width for strip in strips) + 2 * gap
    picture = Image.new("RGB", (width, sum(strip.height + gap for strip in strips) + gap), "white")
    top = gap
    for strip in strips:
        picture.paste(strip, (gap, top))
        top += strip.height + gap
    return picture
