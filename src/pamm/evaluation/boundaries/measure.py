"""Counts of every image of a folder in worker processes, and the scores made of them."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pamm.data.listing import preview
from pamm.evaluation.boundaries import BoundaryError
from pamm.evaluation.boundaries.files import pair_files, read_map, read_truths
from pamm.files import shown
from pamm.runtime.workers import serve_parent
from pamm.tasks.boundary import PROTOCOLS, average_precision, f_measure, protocol_counts

Work = Callable[[Path, Path], np.ndarray]
"""A map's and a truth's file → counts of the image."""

COUNTS = ("cntR", "sumR", "cntP", "sumP")
"""True pixels with a partner, of all; predicted pixels with a partner, of all: the columns of MATLAB's *_ev1.txt."""


@dataclass(frozen=True)
class BoundaryScores:
    """Counts and scores of the boundary benchmark on a set of images."""

    protocol: str
    """A key of `pamm.tasks.boundary.PROTOCOLS`."""
    max_distance: float
    """Largest distance of a pair, as a fraction of the image's diagonal."""
    counts: dict[str, np.ndarray]
    """Image's name → (4, thresholds) int64, rows as in `COUNTS`."""
    light: tuple[str, ...] = ()
    """Names of maps in which most pixels are boundaries."""

    @property
    def total(self) -> np.ndarray:
        """(4, thresholds): the sums over the images."""
        return np.sum(list(self.counts.values()), axis=0)

    def scores(self) -> dict[str, Any]:
        """ODS, OIS and AP, each 0 to 1.

        Returns:
            "ODS": the best F at one threshold for the whole set, with recall, precision and threshold. "OIS": F with each image at
            its own best threshold, with recall and precision. "AP": see `average_precision`.
        """
        best = np.sum([found[:, f_measure(found).argmax()] for found in self.counts.values()], axis=0)
        return {"ODS": self._best(self.total), "OIS": _rates(best), "AP": average_precision(self.total)}

    def notes(self) -> list[str]:
        """Unusual properties of the files.

        Returns:
            Sentences.
        """
        total = len(self.counts)
        kinds = {
            f"of {total} maps are boundaries on most pixels (median above {LIGHT:g}); inverted?": self.light,
            f"of {total} maps are 0 everywhere": [n for n, found in self.counts.items() if not found[3].any()],
            f"of {total} truths have no line": [n for n, found in self.counts.items() if not found[1].any()],
        }
        return [
            f"note: {len(names)} {what}: {preview(shown(name) for name in names)}"
            for what, names in kinds.items()
            if names
        ]

    def images(self) -> dict[str, dict[str, float]]:
        """Scores of the images.

        Returns:
            Name of an image → its best F, with threshold, recall and precision.
        """
        return {name: self._best(found) for name, found in self.counts.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything that was measured, as JSON values.

        Returns:
            Scores, thresholds, and the counts at every threshold, of the set and of each image.
        """
        rule = PROTOCOLS[self.protocol]
        images = self.images()
        return {
            "protocol": self.protocol,
            "max_distance": self.max_distance,
            "images": len(self.counts),
            **self.scores(),
            "comparison": "above the threshold" if rule.strict else "from the threshold on",
            "thresholds": list(rule.thresholds),
            "total": _named(self.total),
            "per_image": {name: {"best": images[name], **_named(found)} for name, found in self.counts.items()},
        }

    def _best(self, found: np.ndarray) -> dict[str, float]:
        place = int(f_measure(found).argmax())
        return {"threshold": PROTOCOLS[self.protocol].thresholds[place], **_rates(found[:, place])}


def _rates(found: np.ndarray) -> dict[str, float]:
    recall, precision = (float(found[i] / max(found[i + 1], 1)) for i in (0, 2))
    return {"F": float(f_measure(found)), "recall": recall, "precision": precision}


def _named(found: np.ndarray) -> dict[str, list[int]]:
    return {name: row.tolist() for name, row in zip(COUNTS, found, strict=True)}


def measure_folders(
    predictions: Path,
    truths: Path,
    *,
    protocol: str = "bdet",
    max_distance: float = 0.0075,
    ids: Path | None = None,
    outline: bool = False,
    suppressed: bool = False,
    invert_maps: bool = False,
    invert_truths: bool = False,
    workers: int = 1,
    progress: bool = False,
) -> BoundaryScores:
    """Measure a folder of boundary maps against a folder of truths of the same names.

    Args:
        predictions: folder of PNG files of 8 or 16 bits, or .npy in [0, 1].
        truths: folder of BSDS .mat with any number of annotators, PNG or .npy; see
            `pamm.evaluation.boundaries.files.read_truths`.
        protocol: a key of `pamm.tasks.boundary.PROTOCOLS`.
        max_distance: largest distance of a pair, as a fraction of the image's diagonal (0.0075 PASCAL and BSDS, 0.011 NYUD).
        ids: list of the names to measure, one per line; by default all files of both folders.
        outline: the truths are the outlines of the regions that the values of their files form.
        suppressed: the maps already went through non-maximum suppression.
        invert_maps: boundaries are dark on light in the maps.
        invert_truths: lines are the pixels of 0 in the truths.
        workers: processes that share the images; the result is the same for any number.
        progress: show a bar on the standard error.

    Returns:
        Counts and scores.

    Raises:
        BoundaryError: files without a partner, of different sizes, or inverted.
        DataError: the list of names cannot be read.
        LabelError: a map or a truth cannot be read.
        ModuleNotFoundError: an extra of pamm[train] is not installed.
    """
    if protocol not in PROTOCOLS:
        raise BoundaryError(f"unknown protocol '{protocol}'; known protocols: {', '.join(PROTOCOLS)}")
    if not 0 <= max_distance < 1:
        raise BoundaryError(
            f"max_distance is {max_distance:g}, expected a fraction of the image's diagonal, e.g. 0.0075"
        )
    pairs = pair_files(Path(predictions), Path(truths), ids)
    light = light_maps({name: files[0] for name, files in pairs.items()}, invert_maps)
    rule = {"protocol": protocol, "max_distance": max_distance, "suppressed": suppressed}
    work = partial(measure_image, **rule, outline=outline, invert_maps=invert_maps, invert_truths=invert_truths)
    found = {}
    images = _start(work, pairs, workers)  # before the bar, which starts a thread: processes are forked without threads
    with tqdm(total=len(pairs), desc="boundaries", unit="image", disable=not progress) as bar:
        for name, counted in images:
            found[name] = counted
            bar.update()
    if not any(counted[1].any() for counted in found.values()):
        raise BoundaryError(
            f"none of the {len(pairs)} truths in {shown(truths, 300)} has a line: give the folder of the truths"
        )
    return BoundaryScores(protocol, max_distance, {name: found[name] for name in pairs}, tuple(light))


def _start(work: Work, pairs: dict[str, tuple[Path, Path]], workers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Name and counts of every image: in this process one by one, or in others, which start now, as they are done."""
    if workers == 1 or len(pairs) == 1:
        return ((name, work(*files)) for name, files in pairs.items())
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(min(workers, len(pairs)), context, serve_parent)
    return _collect(pool, {pool.submit(work, *files): name for name, files in pairs.items()})


def _collect(pool: ProcessPoolExecutor, running: dict[Future, str]) -> Iterator[tuple[str, np.ndarray]]:
    try:
        for future, name in running.items():  # in their order, so that the same error is reported every time
            yield name, future.result()
    except BrokenProcessPool:
        raise BoundaryError(
            "a worker process ended before its image was done, most likely for want of memory: use fewer, e.g. --workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


LIGHT = 0.75
"""A map with a higher median has dark boundaries on light; the median of each of HED's 200 maps of BSDS is 0."""


def light_maps(maps: Mapping[str, Path], invert: bool) -> list[str]:
    """Names of the maps that are light on most pixels. Raises BoundaryError where most maps are, and what `read_map` does."""
    light = [name for name, path in maps.items() if np.median(read_map(path, invert=invert)) > LIGHT]
    if 2 * len(light) > len(maps):
        remedy = "leave out --invert-maps" if invert else "give --invert-maps"
        raise BoundaryError(
            f"{len(light)} of {len(maps)} maps say of most pixels that they are boundaries (median above {LIGHT:g}), e.g. "
            f"{shown(maps[light[0]], 300)}: such maps have boundaries dark on light; {remedy}"
        )
    return light


def measure_image(
    prediction: Path,
    truth: Path,
    *,
    protocol: str,
    max_distance: float,
    outline: bool,
    suppressed: bool,
    invert_maps: bool = False,
    invert_truths: bool = False,
) -> np.ndarray:
    """Measure one image; the arguments are those of `measure_folders`.

    Args:
        prediction: file of the map.
        truth: file of the truth.
        protocol: a key of `pamm.tasks.boundary.PROTOCOLS`.
        max_distance: largest distance of a pair, as a fraction of the image's diagonal.
        outline: the truth is the outline of the regions in its file.
        suppressed: the map already went through non-maximum suppression.
        invert_maps: boundaries are dark on light in the map.
        invert_truths: lines are the pixels of 0 in the truth.

    Returns:
        (4, thresholds) int64: cntR, sumR, cntP, sumP.

    Raises:
        BoundaryError: the two files do not fit together, or are inverted.
        LabelError: a file cannot be read.
    """
    probability = read_map(prediction, invert=invert_maps)
    truths = read_truths(truth, outline=outline, invert=invert_truths)
    height, width = probability.shape
    for marked in truths:
        if marked.shape != probability.shape:
            turned = " (turn the map by 90°)" if marked.shape == (width, height) else ""
            raise BoundaryError(
                f"{prediction} has {height} x {width} pixels, {truth} {marked.shape[0]} x {marked.shape[1]}: write the map at the "
                f"size of its truth, without padding{turned}"
            )
    return protocol_counts(probability, truths, protocol=protocol, max_distance=max_distance, suppressed=suppressed)
