"""Figures as papers print them: tiles in rows and columns, headings above, names at the left, a legend and a caption below.

`tile`, the longer side of a picture in pixels, sets the scale: letters and gaps grow with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pamm.drawing.sheet import Colour

TILE = 240
"""Longer side of a picture, pixels, unless another is asked for."""

INK, SOFT, PALE = (0, 0, 0), (90, 90, 90), (238, 238, 238)
"""Colours of text, of secondary text, and of what is empty."""

RAMP = np.array([(235, 243, 250), (158, 202, 225), (66, 146, 198), (8, 81, 156), (8, 38, 90)])
"""Evenly spaced colours from little (light blue) to much (dark blue)."""


@dataclass(frozen=True)
class Tile:
    """A picture and a note below it."""

    picture: Image.Image
    note: str = ""


@dataclass(frozen=True)
class Block:
    """Named rows of tiles by column; `side` stands at the left, in the middle of the rows' height, under `heading`."""

    rows: Mapping[str, Mapping[str, Tile]]
    side: Tile | None = None
    heading: str = "image"


def compose(
    blocks: Sequence[Block],
    *,
    caption: str = "",
    legends: Mapping[str, Mapping[str, Colour]] | None = None,
    bars: Sequence[Image.Image] = (),
    tile: int = TILE,
) -> Image.Image:
    """Blocks under each other; columns with the same name share a place. RGB.

    legends: title → name → colour. bars: strips that stand between the tiles and the caption.

    Raises ValueError where there is no tile at all.
    """
    scale = Scale(tile)
    widths = _column_widths(blocks, scale)
    sides = [block for block in blocks if block.side is not None]
    side = max((max(block.side.picture.width, scale.width(block.heading)) for block in sides), default=0)
    left = scale.label + (side + scale.gap if side else 0)
    heading = sides[0].heading if sides else ""
    strips = [_headings(widths, heading, left, scale)]
    for block in blocks:
        strips.append(_block(block, widths, left, scale))
        if len(blocks) > 1:
            strips.append(Image.new("RGB", (1, scale.gap), "white"))
    width = max(strip.width for strip in strips)
    for title, names in (legends or {}).items():
        strips.append(_legend(title, names, width, scale))
    strips += bars
    if caption:
        strips.append(_paragraph(caption, width, scale))
    return _stack(strips, scale.gap)


class Scale:
    """Sizes that follow from a tile's side, pixels."""

    def __init__(self, tile: int = TILE):
        self.tile = tile
        self.text = max(10, round(tile / 15))
        self.small = max(9, round(tile / 19))
        self.line = round(self.text * 1.35)
        self.gap = max(3, round(tile / 30))
        self.label = self.line + self.gap

    def width(self, text: str, *, small: bool = False) -> int:
        """Pixels that a text takes."""
        return int(font(self.small if small else self.text).getlength(text)) + 1

    def shorten(self, text: str, width: int, *, small: bool = False) -> str:
        """The end of a text that is wider than `width`: a path's end tells more than its start."""
        if self.width(text, small=small) <= width:
            return text
        return next((t for i in range(len(text)) if self.width(t := "…" + text[i:], small=small) <= width), "")


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which every installation has."""
    return ImageFont.load_default(size)


def empty_tile(size: tuple[int, int], text: str, *, tile: int = TILE) -> Image.Image:
    """A pale picture of (width, height) with a text in its middle: what stands where there is nothing to show."""
    picture, scale = Image.new("RGB", size, PALE), Scale(tile)
    ImageDraw.Draw(picture).text((size[0] / 2, size[1] / 2), text, SOFT, font=font(scale.small), anchor="mm")
    return picture


def ramp(values: np.ndarray) -> np.ndarray:
    """(H, W) in 0..1 → (H, W, 3) uint8, light to dark blue, interpolated linearly."""
    at = np.clip(values, 0, 1) * (len(RAMP) - 1)
    channels = [np.interp(at, np.arange(len(RAMP)), RAMP[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def color_bar(title: str, ticks: Sequence[tuple[float, str]], *, tile: int = TILE) -> Image.Image:
    """The ramp with a title at its left and ticks (place 0..1, text) below. RGB."""
    scale = Scale(tile)
    left, length = scale.width(title) + 2 * scale.gap, round(1.5 * tile)
    strip = Image.new("RGB", (left + length + scale.width(ticks[-1][1]), 2 * scale.line), "white")
    colours = ramp(np.broadcast_to(np.linspace(0, 1, length), (scale.text, length)))
    top = (scale.line - scale.text) // 2
    strip.paste(Image.fromarray(colours), (left, top))
    pen = ImageDraw.Draw(strip)
    pen.text((0, scale.line / 2), title, INK, font=font(scale.text), anchor="lm")
    for place, text in ticks:
        x = left + place * (length - 1)
        pen.line((x, top + scale.text, x, scale.line + scale.gap / 2), SOFT, max(1, scale.gap // 6))
        pen.text((x, 1.5 * scale.line + scale.gap / 4), text, SOFT, font=font(scale.small), anchor="mm")
    return strip


def _column_widths(blocks: Sequence[Block], scale: Scale) -> dict[str, int]:
    rows = [row for block in blocks for row in block.rows.values()]
    widths: dict[str, int] = {}
    for row in rows:
        for column, tile in row.items():
            widths[column] = max(widths.get(column, scale.width(column)), tile.picture.width)
    if not widths:
        raise ValueError("a figure needs at least one tile")
    return widths


def _headings(widths: Mapping[str, int], side: str, left: int, scale: Scale) -> Image.Image:
    strip = Image.new("RGB", (left + sum(widths.values()) + scale.gap * (len(widths) - 1), scale.line), "white")
    pen = ImageDraw.Draw(strip)
    if side:
        pen.text(((scale.label + left - scale.gap) / 2, scale.line / 2), side, INK, font=font(scale.text), anchor="mm")
    for name, width in widths.items():
        pen.text((left + width / 2, scale.line / 2), name, INK, font=font(scale.text), anchor="mm")
        left += width + scale.gap
    return strip


def _block(block: Block, widths: Mapping[str, int], left: int, scale: Scale) -> Image.Image:
    rows = [_row(name, tiles, widths, scale) for name, tiles in block.rows.items()]
    height = sum(row.height for row in rows) + scale.gap * (len(rows) - 1)
    side = None if block.side is None else _noted(block.side, scale)
    strip = Image.new("RGB", (left - scale.label + rows[0].width, max(height, side.height if side else 0)), "white")
    if side is not None:
        room = left - scale.label - scale.gap
        strip.paste(side, (scale.label + (room - side.width) // 2, (strip.height - side.height) // 2))
    top = 0
    for row in rows:
        strip.paste(row.crop((0, 0, scale.label, row.height)), (0, top))
        strip.paste(row.crop((scale.label, 0, row.width, row.height)), (left, top))
        top += row.height + scale.gap
    return strip


def _row(name: str, tiles: Mapping[str, Tile], widths: Mapping[str, int], scale: Scale) -> Image.Image:
    """The name, turned upright along the tiles' height, and the tiles, each in the middle of its column."""
    pictures = {column: _noted(tile, scale) for column, tile in tiles.items()}
    height = max(picture.height for picture in pictures.values())
    tall = max(tile.picture.height for tile in tiles.values())
    strip = Image.new("RGB", (scale.label + sum(widths.values()) + scale.gap * (len(widths) - 1), height), "white")
    label = Image.new("RGB", (tall, scale.line), "white")
    text = scale.shorten(name, tall)
    ImageDraw.Draw(label).text((tall / 2, scale.line / 2), text, INK, font=font(scale.text), anchor="mm")
    strip.paste(label.rotate(90, expand=True), (0, 0))
    x = scale.label
    for column, width in widths.items():
        if column in pictures:
            strip.paste(pictures[column], (x + (width - pictures[column].width) // 2, 0))
        x += width + scale.gap
    return strip


def _noted(tile: Tile, scale: Scale) -> Image.Image:
    if not tile.note:
        return tile.picture
    picture = Image.new("RGB", (tile.picture.width, tile.picture.height + scale.line), "white")
    picture.paste(tile.picture, (0, 0))
    note = scale.shorten(tile.note, picture.width, small=True)
    place = picture.width / 2, tile.picture.height + scale.line / 2
    ImageDraw.Draw(picture).text(place, note, SOFT, font=font(scale.small), anchor="mm")
    return picture


def _legend(title: str, names: Mapping[str, Colour], width: int, scale: Scale) -> Image.Image:
    """A title, then coloured squares with their names, wrapped at `width`."""
    indent = scale.width(title) + 2 * scale.gap
    places, x, line = [], indent, 0
    for name in names:
        needed = scale.small + scale.gap // 2 + scale.width(name, small=True) + 2 * scale.gap
        if x + needed > width and x > indent:
            x, line = indent, line + 1
        places.append((x, line))
        x += needed
    strip = Image.new("RGB", (width, scale.line * (line + 1)), "white")
    pen = ImageDraw.Draw(strip)
    pen.text((0, scale.line / 2), title, INK, font=font(scale.small), anchor="lm")
    for (x, line), (name, colour) in zip(places, names.items(), strict=True):
        middle = scale.line * (line + 0.5)
        pen.rectangle(
            (x, middle - scale.small / 2, x + scale.small, middle + scale.small / 2), fill=colour, outline=SOFT
        )
        pen.text((x + scale.small + scale.gap // 2 + 2, middle), name, INK, font=font(scale.small), anchor="lm")
    return strip


def _paragraph(text: str, width: int, scale: Scale) -> Image.Image:
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and scale.width(longer, small=True) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    lines.append(line)
    strip = Image.new("RGB", (width, scale.line * len(lines)), "white")
    pen = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        pen.text((0, scale.line * (number + 0.5)), line, SOFT, font=font(scale.small), anchor="lm")
    return strip


def _stack(strips: Sequence[Image.Image], gap: int) -> Image.Image:
    """Strips under each other with a white margin around them."""
    width = max(strip.width for strip in strips) + 2 * gap
    picture = Image.new("RGB", (width, sum(strip.height + gap for strip in strips) + gap), "white")
    top = gap
    for strip in strips:
        picture.paste(strip, (gap, top))
        top += strip.height + gap
    return picture
