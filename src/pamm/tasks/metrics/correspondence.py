"""The boundary benchmark's measurements on one image: non-maximum suppression, thinning, matching (protocol: BSDS500).

Plain arrays in, plain arrays out, so that worker processes need nothing else. Lines that are compared are one pixel wide;
a predicted pixel is right where it can be paired with a true pixel within a distance, one to one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.ndimage import correlate1d, map_coordinates

from pamm.tasks.metrics.matching import Matcher

FADE = 5
"""Pixels at the border of an image over which non-maximum suppression fades the map out."""
MARGIN = 1.01
"""Factor by which a neighbour across the boundary must exceed a pixel to suppress it."""
SMOOTHING = 4
"""Radius of the triangle filter under which the boundary's direction is measured."""


def image_counts(
    probability: np.ndarray, truths: Sequence[np.ndarray], thresholds: np.ndarray, max_distance: float
) -> np.ndarray:
    """Counts of one image whose lines are thin already, see `pamm.tasks.boundary.counts`.

    (H, W) float, one or more (H, W) bool → (4, thresholds) int64: cntR, sumR, cntP, sumP.
    """
    reach = max_distance * math.hypot(*probability.shape)
    lowest = probability >= thresholds.min()
    matchers = [Matcher(truth, lowest, reach, nearest=len(truths) > 1) for truth in truths]
    counts = np.zeros((4, len(thresholds)), dtype=np.int64)
    counts[1] = sum(int(truth.sum()) for truth in truths)
    last = None
    for k, threshold in enumerate(thresholds):
        mask = probability >= threshold
        if last is not None and np.array_equal(mask, last):
            counts[:, k] = counts[:, k - 1]
            continue
        last = mask
        predicted = np.flatnonzero(thin(mask))
        column_of = np.full(mask.size, -1)
        column_of[predicted] = np.arange(len(predicted))
        right = np.zeros(len(predicted), dtype=bool)
        for matcher in matchers:
            paired = matcher.match(predicted, column_of)
            counts[0, k] += paired.sum()
            right |= paired
        counts[2:, k] = right.sum(), len(predicted)
    return counts


def thin(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool → its lines one pixel wide, as MATLAB's bwmorph(mask, 'thin', Inf) (Guo and Hall 1989, two passes a turn)."""
    height, width = mask.shape
    stride = width + 2
    padded = np.zeros((height + 2, stride), dtype=np.uint8)
    padded[1:-1, 1:-1] = mask
    flat = padded.ravel()
    active = np.flatnonzero(flat)
    offsets = (1, 1 - stride, -stride, -stride - 1, -1, stride - 1, stride, stride + 1)
    removed = 1
    while removed:
        removed = 0
        for table in _removable():
            code = np.zeros(len(active), dtype=np.uint8)
            for bit, offset in enumerate(offsets):
                code |= flat[active + offset] << bit
            gone = table[code]
            flat[active[gone]] = 0
            active = active[~gone]
            removed += int(gone.sum())
    return padded[1:-1, 1:-1].astype(bool)


@lru_cache(maxsize=1)
def _removable() -> tuple[np.ndarray, np.ndarray]:
    """Which neighbourhoods let their pixel go, in the first and second pass: (256,) bool each.

    Bit i is neighbour x_{i+1} of Guo and Hall: east first, then counter-clockwise.
    """
    bits = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(bool).T
    x = dict(enumerate(bits, start=1)) | {9: bits[0]}
    crossings = sum((~x[i] & (x[i + 1] | x[i + 2])).astype(int) for i in (1, 3, 5, 7))
    pairs = [sum((x[i] | x[i + 1]).astype(int) for i in first) for first in ((1, 3, 5, 7), (2, 4, 6, 8))]
    fewest = np.minimum(pairs[0], pairs[1])
    common = (crossings == 1) & (fewest >= 2) & (fewest <= 3)
    return common & ~((x[2] | x[3] | ~x[8]) & x[1]), common & ~((x[6] | x[7] | ~x[4]) & x[5])


def suppress(probability: np.ndarray, radius: int, smoothing: int = 0) -> np.ndarray:
    """Non-maximum suppression: 0 where the map is larger within `radius` pixels across the boundary's direction.

    (H, W) float in [0, 1] → the same, faded out over the 5 pixels at the border. smoothing: radius of a triangle filter
    applied first, 0 for none.
    """
    if min(probability.shape) < 2:  # all border, where the map is faded out
        return np.zeros(probability.shape)
    edges = triangle(probability.astype(np.float64), smoothing)
    angle = direction(edges)
    y, x = np.mgrid[: edges.shape[0], : edges.shape[1]].astype(np.float64)
    keep = np.ones(edges.shape, dtype=bool)
    limits = [side - 1.001 for side in edges.shape]
    for step in (s for s in range(-radius, radius + 1) if s):
        at = [(y + step * np.sin(angle)).clip(0, limits[0]), (x + step * np.cos(angle)).clip(0, limits[1])]
        keep &= edges * MARGIN >= map_coordinates(edges, at, order=1)
    return edges * keep * _fade(edges.shape)


def _fade(shape: tuple[int, int]) -> np.ndarray:
    """Linear from 0 at the border to 1 inside."""
    ramps = []
    for side in shape:
        distance = np.minimum(np.arange(side), np.arange(side)[::-1])
        ramps.append(np.minimum(distance / max(min(FADE, *(s / 2 for s in shape)), 1e-9), 1.0))
    return ramps[0][:, None] * ramps[1]


def direction(edges: np.ndarray) -> np.ndarray:
    """Angle across the boundary at every pixel, radians in [0, π), from second derivatives of the smoothed map."""
    dy, dx = np.gradient(triangle(edges, SMOOTHING))
    dxx = np.gradient(dx, axis=1)
    dyy, dxy = np.gradient(dy)
    return np.mod(np.arctan(dyy * np.sign(-dxy) / (dxx + 1e-5)), np.pi)


def triangle(values: np.ndarray, radius: int) -> np.ndarray:
    """Convolution with a triangle of 2·radius + 1 pixels along both axes, mirrored at the border; radius 0 changes nothing."""
    if not radius:
        return values
    kernel = np.concatenate([np.arange(1, radius + 1), np.arange(radius + 1, 0, -1)]) / (radius + 1) ** 2
    return correlate1d(correlate1d(values, kernel, axis=0, mode="reflect"), kernel, axis=1, mode="reflect")


def label_boundaries(labels: np.ndarray) -> np.ndarray:
    """(H, W) label map → bool, where a pixel differs from its right, lower or lower right neighbour (the benchmark's seg2bmap)."""
    padded = np.pad(labels, ((0, 1), (0, 1)), mode="edge")
    centre = padded[:-1, :-1]
    return (centre != padded[:-1, 1:]) | (centre != padded[1:, :-1]) | (centre != padded[1:, 1:])
