"""The files of a whole batch of images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pamm.drawing.sheet import SheetRow, Subject, compose_sheet, save_sheet, sheet_row
from pamm.files import shown
from pamm.images import ImageError, open_picture
from pamm.prediction.inputs import PredictError, file_names
from pamm.prediction.maps import DEFAULT_FORMATS, FORMATS, FolderError, check_folder, check_formats, try_folder
from pamm.prediction.predictor import Predictor
from pamm.tasks import Task

SHEET = "contact_sheet.jpg"
SHEET_ROWS = 8
"""A contact sheet shows this many images at most, the first ones."""


@dataclass
class Summary:
    """The result of a batch of images."""

    done: list[Path] = field(default_factory=list)
    """Images that were predicted."""
    skipped: list[Path] = field(default_factory=list)
    """Images whose files existed already."""
    failed: list[tuple[Path, str]] = field(default_factory=list)
    """Images that could not be predicted, each with the reason; also a contact sheet that could not be written."""
    stopped: str | None = None
    """Why the remaining images were not tried: the output folder takes no more files. None if all were tried."""
    sheet: Path | None = None
    """The contact sheet, if one was written."""


def check_output(out: str | Path, paths: Iterable[Path], formats: Sequence[str], *, sheet: bool = True) -> None:
    """Check that the predictions of some images can be written, before any time is spent on them.

    Args:
        out: folder of the predictions.
        paths: the images.
        formats: some of `FORMATS`.
        sheet: whether a contact sheet is written, too.

    Raises:
        PredictError: a file cannot be written, or would replace a label or an image.
    """
    out = Path(os.path.expanduser(out))
    check_formats(formats)
    check_folder(out, formats)
    if sheet:
        _check_sheet(out, paths)
    try_folder(out)


def predict_files(
    predictor: Predictor,
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    sheet: bool = True,
    skip_existing: bool = False,
    progress: bool | None = None,
) -> Summary:
    """Predict images into a folder (see `Maps.save`). An image that fails does not end the batch.

    If several images have the same stem, the files' names also contain what differs in their paths.

    Args:
        predictor: the network.
        paths: the images.
        out: folder of the predictions.
        formats: some of "picture", "png", "npy".
        sheet: also write <out>/contact_sheet.jpg, at most 300 kB, of the first 8 images that are predicted.
        skip_existing: skip an image if all of its files exist and are complete, whichever model made them. An earlier
            contact sheet is kept.
        progress: show a bar on the standard error; None shows it on a terminal.

    Returns:
        The images that were predicted, skipped or failed, with reasons. A full disk ends the batch early; the summary says so.

    Raises:
        PredictError: before any prediction: a wrong format, or an `out` that cannot be written or holds labels or images that
            would be replaced.
        KeyboardInterrupt: with the number of finished images.
    """
    paths, out = [Path(path) for path in paths], Path(os.path.expanduser(out))
    check_output(out, paths, formats, sheet=sheet)
    sheet = sheet and not (skip_existing and os.path.exists(out / SHEET))
    summary, rows = Summary(), list[SheetRow]()
    named = list(zip(paths, file_names(paths), strict=True))
    try:
        for path, name in tqdm(named, "predict", unit="image", disable=None if progress is None else not progress):
            if skip_existing and _is_done(predictor.tasks, out, name, formats):
                summary.skipped.append(path)
                continue
            try:
                maps = predictor(path)
                maps.save(out, stem=name, formats=formats)
                summary.done.append(path)
                if sheet and len(rows) < SHEET_ROWS:
                    rows.append(sheet_row(Subject(shown(name), maps.image), {"": maps}))
            except FolderError as error:
                summary.stopped = str(error)
                break
            except Exception as error:  # of whatever kind: the next image may be sound
                if path not in summary.done[-1:]:
                    summary.failed.append((path, _reason(error)))
    except KeyboardInterrupt:
        finished = len(summary.done) + len(summary.skipped)
        raise KeyboardInterrupt(
            f"interrupted: {finished} of {len(paths)} images are done, their files are whole; go on with --skip-existing"
        ) from None
    if rows and not summary.stopped:
        _add_sheet(summary, rows, out / SHEET)
    return summary


def _reason(error: Exception) -> str:
    if isinstance(error, (ImageError, PredictError)):
        return str(error)
    if _is_out_of_memory(error):
        return "out of memory; shrink the image, or choose a smaller longest side"
    return f"{type(error).__name__}: {shown(error, 300)}"


def _is_done(tasks: Mapping[str, Task], out: Path, name: str, formats: Sequence[str]) -> bool:
    """Whether every file of this image is there and can be read to its end."""
    return all(
        any(_is_whole(out / place) for place in _places(tasks[task], task, name, kind))
        for kind in formats
        for task in tasks
    )


def _places(task: Task, name: str, stem: str, kind: str) -> list[Path]:
    """The possible files of a map: a label has one of several suffixes."""
    place = Path(FORMATS[kind].format(task=name, stem=stem))
    return [place.with_name(stem + suffix) for suffix in task.suffixes] if kind == "png" else [place]


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".npy":
            np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with open_picture(path) as picture:
                picture.verify()
    except Exception:  # Pillow and NumPy raise many kinds for what is no whole file
        return False
    return True


def _add_sheet(summary: Summary, rows: Sequence[SheetRow], path: Path) -> None:
    try:
        summary.sheet = save_sheet(compose_sheet(rows), path)
    except (OSError, MemoryError) as error:
        told = getattr(error, "strerror", None) or str(error) or "out of memory"
        summary.failed.append((path, f"cannot be written ({told}); free the place or choose another folder"))


def _is_out_of_memory(error: Exception) -> bool:
    """Torch raises a plain RuntimeError where the CPU's memory does not suffice."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("allocate memory", "not enough memory")
    )


def _check_sheet(out: Path, paths: Iterable[Path]) -> None:
    """Raise PredictError if the contact sheet would be written among the images, or replace one."""
    inside = next((path for path in paths if os.path.realpath(path.parent) == os.path.realpath(out)), None)
    if inside is not None:
        raise PredictError(
            f"{shown(out, 300)} holds the image {shown(inside.name)}: the contact sheet {SHEET} would become one of the images "
            "there, or replace one; choose another folder for the predictions, or write no contact sheet (--no-sheet)"
        )
