"""Boundary maps and truths from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pamm.data.listing import check_all_read, is_folder, list_folder, preview, read_ids
from pamm.data.matfile import read_mat
from pamm.evaluation.boundaries import BoundaryError
from pamm.files import shown
from pamm.images import open_array
from pamm.tasks.metrics.correspondence import label_boundaries, thin
from pamm.tasks.pictures import INDICES, open_png, read_png

MAPS = (".png", ".npy")
TRUTHS = (".mat", ".png", ".npy")
"""The version in a file of MATLAB 7.3, which scipy does not read."""


def pair_files(predictions: Path, truths: Path, ids: Path | None = None) -> dict[str, tuple[Path, Path]]:
    """Stem → map and truth, sorted: every file of both folders, or those of the stems that a list names, one per line.

    Raises BoundaryError where a map or a truth has no partner, DataError for folders and lists that cannot be read.
    """
    for folder in (predictions, truths):
        if not is_folder(folder):
            raise BoundaryError(f"no folder {folder}: give the folder of the maps, then the folder of the truths")
    listings = list_folder(predictions, MAPS), list_folder(truths, TRUTHS)
    if ids is None:  # else the list says what is measured
        for listing, what, suffixes in zip(listings, ("maps", "truths"), (MAPS, TRUTHS), strict=True):
            remedy = "Write them again so, list the names to measure in a file for --ids"
            check_all_read(listing, what, suffixes, remedy)
    maps, marked = (listing.files for listing in listings)
    for folder, found, suffixes in ((predictions, maps, MAPS), (truths, marked, TRUTHS)):
        if not found:
            raise BoundaryError(
                f"{folder} holds no {', '.join(suffixes)} file: give the folder that holds them directly"
            )
    if not maps.keys() & marked.keys():
        raise BoundaryError(
            f"no map and truth have a name in common: {predictions} holds {preview(path.name for path in maps.values())}; "
            f"{truths} holds {preview(path.name for path in marked.values())}. Name each map as its truth, apart from the suffix"
        )
    stems = read_ids(ids) if ids else sorted(maps.keys() | marked.keys())
    remedy = (
        "add the files or correct the list" if ids else "add them, or list the names to measure in a file for --ids"
    )
    for folder, found, what in ((predictions, maps, "map"), (truths, marked, "truth")):
        absent = [stem for stem in stems if stem not in found]
        if absent:
            raise BoundaryError(
                f"{folder} holds no {what} for {len(absent)} of {len(stems)} images: {preview(absent)}; {remedy}"
            )
    return {stem: (maps[stem], marked[stem]) for stem in stems}


def read_map(path: Path, *, invert: bool = False) -> np.ndarray:
    """A map of probabilities, (H, W) float64 in [0, 1]: PNG of 8 or 16 bits over the largest value of its type, or .npy.

    invert: boundaries are dark on light there. Raises BoundaryError, LabelError.
    """
    values = _read_map(path)
    return 1 - values if invert else values


def _read_map(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        values = read_array(path)
        if values.dtype.kind != "f" or values.ndim != 2 or not values.size:
            raise BoundaryError(
                f"{path} holds {values.dtype} values of shape {values.shape}, expected (H, W) floating point"
            )
        if not (values.min() >= 0 and values.max() <= 1):
            raise BoundaryError(
                f"{path} holds values from {values.min():g} to {values.max():g}, expected probabilities from 0 to 1; apply a "
                "sigmoid to logits, divide levels of grey by their largest"
            )
        return values.astype(np.float64)
    with open_png(path, {"grey": (1, 2, 4, 8, 16)}, "a grey map of 8 or 16 bits") as label:
        values, bits = label.values(), label.bits
    full = 2**bits - 1
    if 0 < values.max() <= {16: 255, 1: 0}.get(bits, 1):
        raise BoundaryError(
            f"{path} holds values up to {values.max()} only, expected 0 to {full} in a PNG of {bits} bits; "
            "write it again with probabilities times that number"
        )
    return values / full


MOST_LINES = 0.5
"""Largest share of pixels that are lines; 0.061 is the largest in the 1063 annotations of BSDS's test images."""

THICKEST = 10
"""Largest mean width of a line, pixels; a wider one is a region."""


def read_truths(path: Path, *, outline: bool, invert: bool = False) -> list[np.ndarray]:
    """The annotators' boundaries, (H, W) bool each, one pixel wide.

    path: BSDS's groundTruth .mat, whose lines are taken as they are; a PNG; a .npy of shape (H, W) or (annotators, H, W).
    Lines of the latter two are thinned. outline: the outlines of the regions of equal values, thinned, in place of the lines.
    invert: lines are the pixels that are 0. Raises BoundaryError, LabelError, also for lines that cover most of a picture or
    are regions.
    """
    suffix = path.suffix.lower()
    if suffix == ".mat":
        maps = _read_bsds(path)
        if outline:
            return [thin(label_boundaries(values)) for values in maps]
        return [_lines(values, path, invert) for values in maps]
    if suffix == ".npy":
        values = read_array(path)
        maps = list(values) if values.ndim == 3 else [values]
    else:
        maps = [read_png(path, {**INDICES, "grey": (1, 2, 4, 8, 16)}, "a picture of lines or labels, one channel")]
    if not maps or any(values.ndim != 2 or not values.size or values.dtype.kind not in "biu" for values in maps):
        raise BoundaryError(
            f"{path} holds {values.dtype} values of shape {values.shape}, expected whole numbers or booleans, "
            "(H, W) or (annotators, H, W)"
        )
    if outline:
        return [thin(label_boundaries(values)) for values in maps]
    for values in maps:
        levels = np.unique(values)
        if len(levels) > 2 or levels[0] != 0:
            raise BoundaryError(
                f"{path} holds the values {preview(map(str, levels))}, expected 0 and one other value on lines; for a map of "
                "labels, whose regions' outlines are the boundaries, give --outline"
            )
    return [_thinned(_lines(values, path, invert), path) for values in maps]


def _lines(values: np.ndarray, path: Path, invert: bool) -> np.ndarray:
    """(H, W) bool, True on the lines of a truth. Raises BoundaryError if they cover most of the picture."""
    lines = values == 0 if invert else values > 0
    if lines.mean() > MOST_LINES:
        remedy = "leave out --invert-truths" if invert else "for dark lines on white give --invert-truths"
        raise BoundaryError(
            f"{path} has lines on {100 * lines.mean():.0f} % of its pixels, expected thin lines: {remedy}; for a mask or a map of "
            "labels, whose regions' outlines are the boundaries, give --outline"
        )
    return lines


def _thinned(lines: np.ndarray, path: Path) -> np.ndarray:
    """Lines one pixel wide. Raises BoundaryError for regions, of which only a skeleton would remain."""
    thinned = thin(lines)
    if lines.sum() > THICKEST * thinned.sum():
        raise BoundaryError(
            f"{path} holds regions, {lines.sum() / max(thinned.sum(), 1):.0f} pixels wide on average, expected lines of at most "
            f"{THICKEST}: for a mask or a map of labels, whose regions' outlines are the boundaries, give --outline"
        )
    return thinned


def read_array(path: Path) -> np.ndarray:
    """A .npy file; one that holds Python objects is refused, not run. Raises BoundaryError."""
    return _reading(path, "NumPy", lambda: open_array(path))


def _read_bsds(path: Path) -> list[np.ndarray]:
    """The maps 'Boundaries' of a BSDS groundTruth, (H, W) numbers each."""
    content = _reading(path, "MATLAB", lambda: read_mat(path, ("groundTruth",)))
    try:
        cells = content["groundTruth"].ravel()
        maps = [cell["Boundaries"][0, 0] for cell in cells]
        arrays = all(isinstance(values, np.ndarray) for values in maps)  # no sparse matrices
        sound = maps and arrays and all(v.ndim == 2 and v.size and v.dtype.kind in "biuf" for v in maps)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise BoundaryError(
            f"{path} has no cell array 'groundTruth' of structs with an (H, W) array 'Boundaries', as BSDS's files have; save "
            "other annotations as PNG or .npy"
        )
    return maps


def _reading(path: Path, kind: str, read: Callable[[], Any]) -> Any:
    """The result of `read`. Any error of a reader on a damaged or foreign file becomes a BoundaryError."""
    try:
        return read()
    except PermissionError:
        raise BoundaryError(f"{path} may not be read: change its permissions") from None
    except Exception as error:
        raise BoundaryError(
            f"{path} is no whole {kind} file of plain arrays ({shown(error, 200)}); copy or write it again"
        ) from None
