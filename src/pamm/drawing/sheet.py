"""Predictions side by side: the contact sheet of a batch, and several models beside the truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pamm.drawing.colours import colour_meanings, encoded, fit, legend, scale_bar
from pamm.drawing.layout import TILE, Block, Scale, Tile, compose, empty_tile
from pamm.files import replacing
from pamm.tasks import Task

if TYPE_CHECKING:
    from pamm.prediction import Maps

TRUTH = "ground truth"


@dataclass(frozen=True)
class Subject:
    """One image, (H, W, 3) uint8, and its truths: task → (H, W) or (H, W, 3) in the task's unit, `valid` (H, W) bool.

    `tasks` draw the truths; a task without a label for this image is in none of the three.
    """

    name: str
    image: np.ndarray
    truths: Mapping[str, np.ndarray] = field(default_factory=dict)
    valid: Mapping[str, np.ndarray] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)


@dataclass(frozen=True)
class SheetRow:
    """One image with its predictions, already small, and the class indices that occur in each task that has classes."""

    block: Block
    tasks: Mapping[str, Task]
    present: Mapping[str, frozenset[int]]


def sheet_row(
    subject: Subject, maps: Mapping[str, Maps], tasks: Sequence[str] | None = None, *, tile: int = TILE
) -> SheetRow:
    """The image and a row per model, then the truth if the subject has any of the tasks', then bars of the colours' ranges.

    Args:
        maps: model → its maps; a model named "" has a row without a name.
        tasks: the columns; by default the tasks of all models.
        tile: longer side of the pictures, pixels; a larger image is shrunk, a tiny one enlarged.
    """
    drawn_by = {name: task for own in maps.values() for name, task in own.tasks.items()}
    tasks = list(drawn_by) if tasks is None else tasks
    step, rows, bars = _step(subject, tile), list[tuple[str, dict[str, Tile]]](), {}
    image = fit(subject.image[::step, ::step], tile)
    for name, own in maps.items():
        tiles = {} if rows else {"image": Tile(image)}
        for task in tasks:
            if task in own:
                reference = _reference(subject, maps, task)
                picture = own.tasks[task].draw(own[task][::step, ::step], reference=reference)
                tiles[task] = Tile(fit(picture, tile))
                scale = own.tasks[task].scale(reference)
                if scale is not None:
                    bars[task] = Tile(scale_bar(own.tasks[task], scale, image.width, text=Scale(tile).small))
            else:
                tiles[task] = Tile(empty_tile(image.size, "not predicted", tile=tile))
        rows.append((name, tiles))
    if any(task in subject.truths for task in tasks):
        rows.append((TRUTH, truth_row(subject, tasks, tile=tile)))
    if bars:
        rows.append(("", bars))
    shown = {task: drawn_by[task] for task in tasks if task in drawn_by}
    present = {name: _classes(name, subject, maps, step) for name, task in shown.items() if legend(task)}
    return SheetRow(Block(rows, subject.name), shown, present)


def truth_row(subject: Subject, tasks: Sequence[str], *, tile: int = TILE) -> dict[str, Tile]:
    """Task → the drawn truth, unlabelled pixels grey, or a pale tile where the image has no label for it."""
    step, row = _step(subject, tile), {}
    for task in tasks:
        if task in subject.truths:
            truth, valid = subject.truths[task], subject.valid[task][::step, ::step]
            row[task] = Tile(fit(subject.tasks[task].draw(truth[::step, ::step], valid=valid, reference=truth), tile))
        else:
            row[task] = Tile(empty_tile(fit(subject.image[::step, ::step], tile).size, "no label", tile=tile))
    return row


def compose_sheet(rows: Sequence[SheetRow], *, caption: str = "", tile: int = TILE) -> Image.Image:
    """Rows under each other, then what the colours mean and a caption. Raises ValueError for no row."""
    tasks = {name: task for row in rows for name, task in row.tasks.items()}
    present = {name: frozenset().union(*(row.present.get(name, ()) for row in rows)) for name in tasks}
    legends = colour_meanings(tasks, present)
    return compose([row.block for row in rows], legends=legends, caption=caption, tile=tile)


def contact_sheet(items: Iterable[tuple[str, Maps]], *, tile: int = TILE) -> Image.Image:
    """One row per (name, maps): the image and each task's picture side by side, with captions and what the colours mean.

    Colours that follow the range of a map belong only to that map: each has a bar of its own.
    """
    rows = [sheet_row(Subject(name, maps.image), {"": maps}, tile=tile) for name, maps in items]
    return compose_sheet(rows, tile=tile)


def save_sheet(sheet: Image.Image, path: str | Path, *, max_bytes: int = 300_000) -> Path:
    """Write a JPEG or PNG (by the suffix) of at most `max_bytes`: first the JPEG's quality gives way, then the size."""
    path = Path(path)
    forms = [("jpeg", {"quality": quality, "subsampling": 0}) for quality in (92, 85, 75, 65)]
    if path.suffix.lower() == ".png":
        forms = [("png", {"optimize": True})]
    while True:
        for kind, options in forms:
            content = encoded(sheet, kind, **options)
            if len(content) <= max_bytes or max(sheet.size) <= 64:
                with replacing(path) as new:
                    new.write_bytes(content)
                return path
        size = max(1, sheet.width * 4 // 5), max(1, sheet.height * 4 // 5)
        sheet = sheet.resize(size, Image.Resampling.LANCZOS)


def _step(subject: Subject, tile: int) -> int:
    """Every how many rows and columns suffice for a picture of this size."""
    return max(1, max(subject.image.shape[:2]) // (4 * tile))


def _reference(subject: Subject, maps: Mapping[str, Maps], task: str) -> np.ndarray:
    """The values that the task's colours follow: the truth, else those of all models together."""
    if task in subject.truths:
        return subject.truths[task]
    values = [own[task] for own in maps.values() if task in own]
    return np.stack(values) if len(values) > 1 else values[0]


def _classes(task: str, subject: Subject, maps: Mapping[str, Maps], step: int) -> frozenset[int]:
    """The classes that occur in the pictures of a task of one image."""
    parts = [own[task][::step, ::step] for own in maps.values() if task in own]
    if task in subject.truths:
        parts.append(subject.truths[task][::step, ::step][subject.valid[task][::step, ::step]])
    return frozenset(int(i) for part in parts for i in np.unique(part))
