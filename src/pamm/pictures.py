"""Pictures of predictions side by side: contact sheets, legends of classes, and files no larger than asked for."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

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


def draw_pair(task: Task, logits: Tensor, label: Tensor | None) -> tuple[np.ndarray, np.ndarray | None]:
    """(channels, H, W) logits, (c, H, W) label → pictures (H, W, 3) uint8 of the prediction and of the truth, on its scale.

    Ignored pixels of the truth are grey; a label that is None or ignored everywhere has no picture.
    """
    prediction, truth, picture = task.decode(logits[None])[0].cpu().numpy(), None, None
    valid = None if label is None else task.valid(label)[0].cpu().numpy()
    if valid is not None and valid.any():
        values = task.truth(label).cpu().numpy()
        truth = np.where(valid.reshape(valid.shape + (1,) * (values.ndim - 2)), values, np.zeros_like(values))
        picture = task.draw(truth, valid=valid, reference=truth)
    return task.draw(prediction, reference=truth), picture


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
    """One image of a contact sheet, already small: tiles by column, and the class indices in each task that has classes."""

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
    return SheetRow(name, {key: fit(picture, tile) for key, picture in pictures.items()}, maps.tasks, present)


def fit(picture: np.ndarray, side: int) -> Image.Image:
    """(H, W, 3) uint8 → a picture whose longer side is `side`, no side below 1 pixel."""
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    method = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize(size, method)


def contact_sheet(items: Iterable[tuple[str, Maps]], *, tile: int = TILE) -> Image.Image:
    """One row per (name, maps): the image and each task's picture side by side, with captions and the classes' colours."""
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
    """Lines of (x, text, colour): per task its name and the classes that occur, wrapped at `width`."""
    lines = []
    tasks = {name: row.tasks[name] for row in rows for name in row.present}
    for task in tasks:
        classes = legend(tasks[task], frozenset().union(*(row.present.get(task, ()) for row in rows)))
        lines.append([(GAP, f"{task}:", None)])
        x = indent = GAP + _width(f"{task}:") + GAP
        for name, colour in classes.items():
            needed = SWATCH + 4 + _width(name) + GAP
            if x + needed > width and x > indent:
                lines.append([])
                x = indent
            lines[-1].append((x, name, colour))
            x += needed
    return lines


@cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(TEXT)


def _width(text: str) -> int:
    return int(_font().getlength(text)) + 1


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
                path.write_bytes(buffer.getvalue())
                return path
        size = max(1, sheet.width * 4 // 5), max(1, sheet.height * 4 // 5)
        sheet = sheet.resize(size, Image.Resampling.LANCZOS)
