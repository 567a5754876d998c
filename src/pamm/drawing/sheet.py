"""Pictures of predictions side by side: contact sheets, legends of classes, and files no larger than asked for."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pamm.files import replacing
from pamm.tasks import Task

if TYPE_CHECKING:
    from pamm.prediction import Maps

TILE = 240
"""Longer side of a contact sheet's tiles, pixels."""
GAP, LINE, TEXT = 8, 18, 12
"""Space between tiles, height of a line of text, and size of its letters, pixels."""

SWATCH = 12
"""Side of a legend's coloured square, pixels."""

Colour = tuple[int, int, int]


def legend(task: Task, present: Iterable[int] | None = None) -> dict[str, Colour]:
    """Class name → colour in the task's pictures, of all classes or those `present`; empty for a task without classes."""
    classes: Sequence[str] = getattr(task, "classes", ())
    shown = sorted(range(len(classes)) if present is None else {i for i in present if i < len(classes)})
    if not shown:
        return {}
    colours = task.draw(np.array([shown], np.uint8))[0]
    return {classes[i]: tuple(int(v) for v in colour) for i, colour in zip(shown, colours, strict=True)}


class Pair(NamedTuple):
    """Pictures (H, W, 3) uint8 of a prediction and its truth, on one scale, and that scale (see `Task.scale`)."""

    prediction: np.ndarray
    truth: np.ndarray | None
    scale: tuple[float, float] | None


def draw_pair(task: Task, logits: Tensor, label: Tensor | None) -> Pair:
    """(channels, H, W) logits, (c, H, W) label → their pictures on the truth's scale, or on the prediction's own without one.

    Ignored pixels of the truth are grey; a label that is None or ignored everywhere has no picture.
    """
    prediction, truth, picture = task.decode(logits[None])[0].cpu().numpy(), None, None
    valid = None if label is None else task.valid(label)[0].cpu().numpy()
    if valid is not None and valid.any():
        values = task.truth(label).cpu().numpy()
        truth = np.where(valid.reshape(valid.shape + (1,) * (values.ndim - 2)), values, np.zeros_like(values))
        picture = task.draw(truth, valid=valid, reference=truth)
    return Pair(task.draw(prediction, reference=truth), picture, task.scale(prediction if truth is None else truth))


def scale_text(task: Task, scale: tuple[float, float]) -> str:
    """A range of values in the task's unit, in words, e.g. "0.52 to 9.81 m"."""
    low, high = _ends(scale)
    return f"{low} to {high} {task.map_unit}".rstrip()


def _ends(scale: tuple[float, float]) -> tuple[str, str]:
    """Both values with the decimals that show three digits of the higher one."""
    digits = max(0, 2 - math.floor(math.log10(max(scale[1], 1e-6))))
    return f"{scale[0]:.{digits}f}", f"{scale[1]:.{digits}f}"


def scale_bar(task: Task, scale: tuple[float, float], width: int, *, text: int = TEXT) -> Image.Image:
    """The colours of `draw` from the lowest to the highest value of a range, with both values and the unit below them."""
    low, high = (f"{value} {task.map_unit}".rstrip() for value in _ends(scale))
    width = max(width, _width(low, text) + _width(high, text) + GAP)
    values = np.broadcast_to(np.linspace(*scale, width), (text, width))
    bar = Image.new("RGB", (width, 2 * text + text // 2 + 2), "white")
    bar.paste(Image.fromarray(task.draw(values, reference=np.array([scale]))))
    pen = ImageDraw.Draw(bar)
    pen.text((0, text + 2), low, "black", font=_font(text))
    pen.text((width, text + 2), high, "black", font=_font(text), anchor="ra")
    return bar


def png_uri(picture: Image.Image) -> str:
    """The picture as a data URI of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def embedded(picture: np.ndarray, side: int) -> str:
    """(H, W, 3) uint8 → a data URI of the PNG or the JPEG, whichever is smaller, with a longer side of `side` pixels."""
    image, files = fit(picture, side), {}
    for kind, options in (("png", {}), ("jpeg", {"quality": 88, "subsampling": 0})):
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        files[kind] = buffer.getvalue()
    kind = min(files, key=lambda kind: len(files[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}"


@dataclass(frozen=True)
class SheetRow:
    """One image of a contact sheet, already small: tiles by column, and the class indices in each task that has classes.

    A tile whose colours follow the range of its map has a bar of them below it.
    """

    name: str
    tiles: Mapping[str, Image.Image]
    tasks: Mapping[str, Task]
    present: Mapping[str, frozenset[int]]


def sheet_row(name: str, maps: Maps, *, tile: int = TILE) -> SheetRow:
    """The image and each task's picture, shrunk (or a tiny one enlarged) to a longer side of `tile`."""
    step = max(1, max(maps.image.shape[:2]) // (4 * tile))
    pictures = {"image": maps.image} | {task: maps.draw(task, step=step) for task in maps}
    present = {
        name: frozenset(np.unique(maps[name][::step, ::step]).tolist())
        for name, task in maps.tasks.items()
        if legend(task)
    }
    tiles = {key: fit(picture, tile) for key, picture in pictures.items()}
    for key, task in maps.tasks.items():
        scale = task.scale(maps[key])
        if scale is not None:
            tiles[key] = _above(tiles[key], scale_bar(task, scale, tiles[key].width))
    return SheetRow(name, tiles, maps.tasks, present)


def _above(upper: Image.Image, lower: Image.Image) -> Image.Image:
    joined = Image.new("RGB", (max(upper.width, lower.width), upper.height + 2 + lower.height), "white")
    joined.paste(upper, (0, 0))
    joined.paste(lower, (0, upper.height + 2))
    return joined


def fit(picture: np.ndarray, side: int) -> Image.Image:
    """(H, W, 3) uint8 → a picture whose longer side is `side`, no side below 1 pixel."""
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    method = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize(size, method)


def contact_sheet(items: Iterable[tuple[str, Maps]], *, tile: int = TILE) -> Image.Image:
    """One row per (name, maps): the image and each task's picture side by side, with captions and what the colours mean.

    Colours that follow the range of a map are those of that map alone: each has a bar of its own.
    """
    return compose_sheet([sheet_row(name, maps, tile=tile) for name, maps in items])


def compose_sheet(rows: Sequence[SheetRow]) -> Image.Image:
    """Rows of tiles under the columns' captions, each row under its name, the legends last. Raises ValueError for none."""
    if not rows:
        raise ValueError("a contact sheet needs at least one image")
    columns = list(dict.fromkeys(key for row in rows for key in row.tiles))
    pitch = {key: max(row.tiles[key].width for row in rows if key in row.tiles) for key in columns}
    pitch = {key: max(width, _width(key)) + GAP for key, width in pitch.items()}
    width = max(GAP + sum(pitch.values()), 2 * GAP + 2 * TILE)
    notes = _legend_lines(rows, width - 2 * GAP)
    heights = [max(tile.height for tile in row.tiles.values()) + LINE + GAP for row in rows]
    sheet = Image.new("RGB", (width, LINE + GAP + sum(heights) + LINE * len(notes) + GAP), "white")
    pen, left, top = ImageDraw.Draw(sheet), GAP, LINE + GAP
    for key in columns:
        pen.text((left, GAP // 2), key, "black", font=_font())
        for row, below in zip(rows, np.cumsum([top, *heights[:-1]]).tolist(), strict=True):
            if key in row.tiles:
                sheet.paste(row.tiles[key], (left, below + LINE))
        left += pitch[key]
    for row, height in zip(rows, heights, strict=True):
        pen.text((GAP, top), _shorten(row.name, width - 2 * GAP), "dimgrey", font=_font())
        top += height
    for line in notes:
        for x, text, colour in line:
            if colour is not None:
                pen.rectangle((x, top + 2, x + SWATCH, top + 2 + SWATCH), fill=colour, outline="grey")
            pen.text((x + (0 if colour is None else SWATCH + 4), top), text, "black", font=_font())
        top += LINE
    return sheet


def _legend_lines(rows: Sequence[SheetRow], width: int) -> list[list[tuple[int, str, Colour | None]]]:
    """Lines of (x, text, colour): per task its name and the classes that occur or what its colours mean, wrapped at `width`."""
    lines = []
    tasks = {name: task for row in rows for name, task in row.tasks.items()}
    for name, task in tasks.items():
        classes = legend(task, frozenset().union(*(row.present.get(name, ()) for row in rows)))
        parts = list(classes.items()) or [(word, None) for word in task.colours.split()]
        if not parts:
            continue
        lines.append([(GAP, f"{name}:", None)])
        x = indent = GAP + _width(f"{name}:") + GAP
        for text, colour in parts:
            needed = _width(text) + (GAP // 2 if colour is None else SWATCH + 4 + GAP)
            if x + needed > width and x > indent:
                lines.append([])
                x = indent
            lines[-1].append((x, text, colour))
            x += needed
    return lines


@cache
def _font(size: int = TEXT) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _width(text: str, size: int = TEXT) -> int:
    return int(_font(size).getlength(text)) + 1


def _shorten(text: str, width: int) -> str:
    """The end of a text that is wider than `width`: a path's end tells more than its start."""
    if _width(text) <= width:
        return text
    start = next(i for i in range(len(text)) if _width("…" + text[i:]) <= width)
    return "…" + text[start:]


def save_sheet(sheet: Image.Image, path: str | Path, *, max_bytes: int = 300_000) -> Path:
    """Write a JPEG or PNG (by the suffix) of at most `max_bytes`: first the JPEG's quality gives way, then the size."""
    path = Path(path)
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    qualities = (92, 85, 75, 65) if kind == "JPEG" else (None,)
    while True:
        for quality in qualities:
            buffer = io.BytesIO()
            options = {"optimize": True} if quality is None else {"quality": quality, "subsampling": 0}
            sheet.save(buffer, format=kind, **options)
            if len(buffer.getvalue()) <= max_bytes or max(sheet.size) <= 64:
                with replacing(path) as new:
                    new.write_bytes(buffer.getvalue())
                return path
        size = max(1, sheet.width * 4 // 5), max(1, sheet.height * 4 // 5)
        sheet = sheet.resize(size, Image.Resampling.LANCZOS)
