"""Predictions of several models side by side, with the truth where there is one (`pamm look predictions`; paper Fig. 5, 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from pamm.look.figure import TILE, Block, Tile, compose, empty_tile
from pamm.look.subjects import Subject
from pamm.pictures import Colour, fit, legend
from pamm.predict import Maps, Predictor
from pamm.tasks import Task

TRUTH = "ground truth"


def compare(
    models: Mapping[str, Predictor], subjects: Sequence[Subject], tasks: Sequence[str], *, tile: int = TILE
) -> tuple[Image.Image, dict[str, list[Maps]]]:
    """One block per image, in it a row per model and one for the truth, a column per task; and the maps, model → images."""
    maps = {name: [predict(subject.image) for subject in subjects] for name, predict in models.items()}
    blocks = [
        prediction_block(subject, {name: own[k] for name, own in maps.items()}, tasks, tile=tile)
        for k, subject in enumerate(subjects)
    ]
    drawn_by = {name: next(m.tasks[name] for m in models.values() if name in m.tasks) for name in tasks}
    legends = {name: classes for name, task in drawn_by.items() if (classes := _present(name, task, maps, subjects))}
    caption = "Predictions at the image's own size; where a task's colours follow its range, that of the "
    caption += (
        "ground truth, or else of all models together." if any(s.truths for s in subjects) else "models together."
    )
    if any(not valid.all() for s in subjects for name, valid in s.valid.items() if name in tasks):
        caption += " Grey: no label."
    return compose(blocks, caption=caption, legends=legends, tile=tile), maps


def prediction_block(subject: Subject, maps: Mapping[str, Maps], tasks: Sequence[str], *, tile: int = TILE) -> Block:
    """The image at the left, a row per model, and the truth below if the subject has any of the tasks'."""
    step = max(1, max(subject.image.shape[:2]) // (4 * tile))
    side = fit(subject.image[::step, ::step], tile)
    rows: dict[str, dict[str, Tile]] = {}
    for name, own in maps.items():
        rows[name] = {}
        for task in tasks:
            if task in own:
                reference = subject.truths.get(task, np.stack([m[task] for m in maps.values() if task in m]))
                picture = own.tasks[task].draw(own[task][::step, ::step], reference=reference)
                rows[name][task] = Tile(fit(picture, tile))
            else:
                rows[name][task] = Tile(empty_tile(side.size, "not predicted", tile=tile))
    if any(task in subject.truths for task in tasks):
        rows[TRUTH] = truth_row(subject, tasks, tile=tile)
    return Block(rows, Tile(side, subject.name))


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


def _present(
    name: str, task: Task, maps: Mapping[str, Sequence[Maps]], subjects: Sequence[Subject]
) -> dict[str, Colour]:
    """The legend of the classes that occur in any of the pictures."""
    if not legend(task):
        return {}
    found = {int(i) for own in maps.values() for m in own if name in m for i in np.unique(m[name])}
    found |= {int(i) for s in subjects if name in s.truths for i in np.unique(s.truths[name][s.valid[name]])}
    return legend(task, found)
