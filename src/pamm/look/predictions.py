"""Predictions of several models side by side, with the truth where there is one (`pamm look predictions`; paper Fig. 5, 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from pamm.drawing.figure import TILE, Block, Scale, Tile, compose, empty_tile
from pamm.drawing.sheet import fit, legend, scale_bar
from pamm.look.subjects import Subject
from pamm.prediction import Maps, Predictor

TRUTH = "ground truth"


def compare(
    models: Mapping[str, Predictor],
    subjects: Iterable[Subject],
    tasks: Sequence[str],
    *,
    tile: int = TILE,
    keep: Callable[[Subject, Mapping[str, Maps]], None] | None = None,
) -> Image.Image:
    """One block per image, in it a row per model and one for the truth, a column per task.

    keep: called with every subject and its maps, model → maps, which are forgotten afterwards.
    """
    blocks, present = [], {name: set[int]() for name in tasks}
    has_truth = has_gaps = False
    for subject in subjects:
        maps = {name: predict(subject.image) for name, predict in models.items()}
        blocks.append(prediction_block(subject, maps, tasks, tile=tile))
        for name, found in present.items():
            found |= _classes(name, subject, maps)
        shown = [subject.valid[name] for name in tasks if name in subject.truths]
        has_truth, has_gaps = has_truth or bool(shown), has_gaps or not all(valid.all() for valid in shown)
        if keep is not None:
            keep(subject, maps)
    drawn_by = {name: next(m.tasks[name] for m in models.values() if name in m.tasks) for name in tasks}
    legends = {name: legend(drawn_by[name], found) for name, found in present.items() if found}
    caption = "Predictions at the image's own size. "
    if any(task.map_unit for task in drawn_by.values()):
        shared = "the ground truth, or else of all models together" if has_truth else "all models together"
        caption += f"Colours that follow a range take that of {shared}; a bar tells it, and values beyond have its ends' colours. "
    caption += "".join(f"{name}: {task.colours}. " for name, task in drawn_by.items() if task.colours)
    return compose(blocks, caption=caption + "Grey: no label." * has_gaps, legends=legends, tile=tile)


def prediction_block(subject: Subject, maps: Mapping[str, Maps], tasks: Sequence[str], *, tile: int = TILE) -> Block:
    """The image at the left, a row per model, the truth below if the subject has any of the tasks', then bars of their scales."""
    step = max(1, max(subject.image.shape[:2]) // (4 * tile))
    side = fit(subject.image[::step, ::step], tile)
    rows: dict[str, dict[str, Tile]] = {}
    bars = {}
    for name, own in maps.items():
        rows[name] = {}
        for task in tasks:
            if task in own:
                reference = subject.truths.get(task, np.stack([m[task] for m in maps.values() if task in m]))
                scale = own.tasks[task].scale(reference)
                if scale is not None:
                    bars[task] = Tile(scale_bar(own.tasks[task], scale, side.width, text=Scale(tile).small))
                picture = own.tasks[task].draw(own[task][::step, ::step], reference=reference)
                rows[name][task] = Tile(fit(picture, tile))
            else:
                rows[name][task] = Tile(empty_tile(side.size, "not predicted", tile=tile))
    if any(task in subject.truths for task in tasks):
        rows[TRUTH] = truth_row(subject, tasks, tile=tile)
    return Block(rows | ({"": bars} if bars else {}), Tile(side, subject.name))


def truth_row(subject: Subject, tasks: Sequence[str], *, tile: int = TILE) -> dict[str, Tile]:
    """Task → the drawn truth, unlabelled pixels grey, or a pale tile where the image has no label for it."""
    step = max(1, max(subject.image.shape[:2]) // (4 * tile))
    row = {}
    for task in tasks:
        if task in subject.truths:
            truth, valid = subject.truths[task], subject.valid[task][::step, ::step]
            row[task] = Tile(fit(subject.tasks[task].draw(truth[::step, ::step], valid=valid, reference=truth), tile))
        else:
            row[task] = Tile(empty_tile(fit(subject.image[::step, ::step], tile).size, "no label", tile=tile))
    return row


def _classes(name: str, subject: Subject, maps: Mapping[str, Maps]) -> set[int]:
    """The classes that occur in the pictures of a task of one image; empty for a task without classes."""
    own = [m for m in maps.values() if name in m]
    if not legend(own[0].tasks[name] if own else subject.tasks[name]):
        return set()
    parts = [m[name] for m in own]
    if name in subject.truths:
        parts.append(subject.truths[name][subject.valid[name]])
    return {int(i) for part in parts for i in np.unique(part)}
