"""Predictions of several models side by side, with the truth where there is one (`pamm look predictions`; paper Fig. 5, 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from PIL import Image

from pamm.drawing.layout import TILE
from pamm.drawing.sheet import Subject, compose_sheet, sheet_row
from pamm.prediction import Maps, Predictor


def compare(
    models: Mapping[str, Predictor],
    subjects: Iterable[Subject],
    tasks: Sequence[str],
    *,
    tile: int = TILE,
    keep: Callable[[Subject, Mapping[str, Maps]], None] | None = None,
) -> Image.Image:
    """Draw the predictions of several networks side by side.

    Each image is a block with one row per model and one for the truth, and one column per task.

    Args:
        models: name → network.
        subjects: images with their truths.
        tasks: names of the tasks, in the order of the columns.
        tile: longer side of a picture, pixels.
        keep: called with every subject and its maps (model → maps), which are not kept otherwise.

    Returns:
        The picture.

    Raises:
        LookError: the models have different classes for a task.
    """
    rows, has_truth, has_gaps = [], False, False
    for subject in subjects:
        maps = {name: predict(subject.image) for name, predict in models.items()}
        rows.append(sheet_row(subject, maps, tasks, tile=tile))
        valid = [subject.valid[name] for name in tasks if name in subject.truths]
        has_truth, has_gaps = has_truth or bool(valid), has_gaps or not all(known.all() for known in valid)
        if keep is not None:
            keep(subject, maps)
    caption = "Predictions at the image's own size. "
    if any(task.map_unit for row in rows for task in row.tasks.values()):
        shared = "the ground truth, or else of all models together" if has_truth else "all models together"
        caption += f"Colours that follow a range use that of {shared}. A bar shows it; values beyond have the colours of its ends. "
    return compose_sheet(rows, caption=caption + "Grey: no label." * has_gaps, tile=tile)
