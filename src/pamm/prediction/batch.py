"""The files of a whole batch of images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from pamm.images import ImageError
from pamm.pictures import SheetRow, compose_sheet, save_sheet, sheet_row
from pamm.prediction.inputs import PredictError, file_names
from pamm.prediction.maps import FORMATS, check_folder, check_formats
from pamm.prediction.predictor import Predictor

SHEET = "contact_sheet.jpg"
SHEET_ROWS = 8
"""A contact sheet shows this many images at most, the first ones."""


@dataclass
class Summary:
    """What became of a batch of images."""

    done: list[Path] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)
    """Image and the reason why it has no maps; the contact sheet and the reason why it was not written."""
    sheet: Path | None = None
    """The contact sheet, if one was written."""


def predict_files(
    predictor: Predictor,
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    formats: Sequence[str] = tuple(FORMATS),
    sheet: bool = True,
    progress: bool | None = None,
) -> Summary:
    """Predict every image into `out` (see `Maps.save`), going on after a bad one.

    Images of one stem keep apart by what differs in their paths. `sheet`: also <out>/contact_sheet.jpg, at most 300 kB,
    of the first 8 images. progress: None shows a bar on a terminal. Raises PredictError, before anything is predicted, for
    no or an unknown format, and for an `out` that is no folder or where files would replace labels or images; the failures
    of single images are in the summary.
    """
    paths, out = [Path(path) for path in paths], Path(os.path.expanduser(out))
    check_formats(formats)
    check_folder(out, formats)
    if sheet:
        _check_sheet(out, paths)
    summary, rows = Summary(), list[SheetRow]()
    hidden = None if progress is None else not progress
    for path, name in tqdm(list(zip(paths, file_names(paths), strict=True)), "predict", unit="image", disable=hidden):
        try:
            maps = predictor(path)
            maps.save(out, stem=name, formats=formats)
        except (ImageError, PredictError) as error:
            summary.failed.append((path, str(error)))
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            summary.failed.append((path, "out of memory; shrink the image, or choose a smaller longest side"))
        else:
            summary.done.append(path)
            if sheet and len(rows) < SHEET_ROWS:
                rows.append(sheet_row(name, maps))
    if rows:
        _add_sheet(summary, rows, out / SHEET)
    return summary


def _add_sheet(summary: Summary, rows: Sequence[SheetRow], path: Path) -> None:
    try:
        summary.sheet = save_sheet(compose_sheet(rows), path)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}); free the place or choose another folder"
        summary.failed.append((path, reason))


def _is_out_of_memory(error: Exception) -> bool:
    """Torch raises a plain RuntimeError where the CPU's memory does not suffice."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("allocate memory", "not enough memory")
    )


def _check_sheet(out: Path, paths: Iterable[Path]) -> None:
    """Raise PredictError where the contact sheet would come among the images, or in place of one."""
    inside = next((path for path in paths if os.path.realpath(path.parent) == os.path.realpath(out)), None)
    if inside is not None:
        raise PredictError(
            f"{out} holds the image {inside.name}: the contact sheet {SHEET} would become one of the images there, or "
            "replace one; choose another folder for the predictions, or write no contact sheet (--no-sheet)"
        )
