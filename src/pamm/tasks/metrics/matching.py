"""One-to-one pairs of predicted and true boundary pixels: as many as can be, and of those the nearest.

Rows are true pixels, columns predicted ones, and an edge joins two within reach. The size of a largest matching is unique,
but which columns it covers is not, and over several annotators that decides how many predicted pixels are right. The
benchmark pairs near pixels first, so of all largest matchings one of the least total distance is taken.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import (
    breadth_first_order,
    connected_components,
    maximum_flow,
    min_weight_full_bipartite_matching,
)


class Matcher:
    """Pairs the pixels of one annotator's map with those of predicted maps, one map after the other.

    The maps of neighbouring thresholds differ little: a matching starts from the last one, and groups of pixels that were
    paired before are remembered. Neither changes a result.

    truth: (H, W) bool. allowed: (H, W) bool, the pixels that the predicted maps may hold. reach: pixels. nearest: take a
    matching of the least total distance; not needed where its size is all that counts.
    """

    def __init__(self, truth: np.ndarray, allowed: np.ndarray, reach: float, *, nearest: bool):
        height, width = truth.shape
        side = int(reach)
        dy, dx = np.mgrid[-side : side + 1, -side : side + 1].reshape(2, -1)
        near = dy**2 + dx**2 <= reach**2
        y, x = (axis[:, None] + offsets[near] for axis, offsets in zip(np.nonzero(truth), (dy, dx), strict=True))
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        rows, offsets = np.nonzero(inside)
        pixels = (y * width + x)[inside]
        kept = allowed.ravel()[pixels]
        self.rows, self.pixels = rows[kept], pixels[kept]
        self.costs = np.hypot(dy, dx)[near][offsets[kept]] if nearest else None
        self.partners = np.full(len(y), -1)
        """Of every true pixel, the flat index of the pixel it was last paired with, or -1."""
        self.solved: dict[bytes, np.ndarray] = {}
        """Pixels of a group that competes for too few true ones → which of them are paired."""

    def match(self, predicted: np.ndarray, column_of: np.ndarray) -> np.ndarray:
        """Which predicted pixels are paired.

        predicted: sorted flat indices of the map's pixels. column_of: for every pixel of the image its place among
        `predicted`, or -1. Returns bool, one for each of `predicted`.
        """
        columns = column_of[self.pixels]
        met = np.flatnonzero(columns >= 0)
        rows, columns = self.rows[met], columns[met]
        mates = np.where(self.partners >= 0, column_of[self.partners], -1)
        mates = augment(rows, columns, mates, len(predicted))
        paired = mates >= 0
        self.partners = np.full(len(mates), -1)
        self.partners[paired] = predicted[mates[paired]]
        right = np.zeros(len(predicted), dtype=bool)
        right[mates[paired]] = True
        if self.costs is not None:
            self._take_nearest(rows, columns, self.costs[met], mates, predicted, right)
        return right

    def _take_nearest(
        self,
        rows: np.ndarray,
        columns: np.ndarray,
        costs: np.ndarray,
        mates: np.ndarray,
        predicted: np.ndarray,
        right: np.ndarray,
    ) -> None:
        """Settle in `right` which of the columns are covered that a largest matching may leave out."""
        for edges, members in contested(rows, columns, mates, right):
            key = predicted[members].tobytes()
            if key not in self.solved:
                places = np.searchsorted(members, columns[edges])
                self.solved[key] = nearest_columns(rows[edges], places, costs[edges], len(members))
            right[members] = self.solved[key]


def augment(rows: np.ndarray, columns: np.ndarray, mates: np.ndarray, width: int) -> np.ndarray:
    """A largest matching of the bipartite graph of these (row, column) edges, from any matching of it.

    mates: the column of every row, or -1; likewise the result. As a flow of units: scipy's own bipartite matching does not
    end in reasonable time on graphs like these. Pairs that exist are edges that lead back.
    """
    height = len(mates)
    free = np.ones(width, dtype=bool)
    free[mates[mates >= 0]] = False
    alone, unused = np.flatnonzero(mates < 0), np.flatnonzero(free)
    back = mates[rows] == columns
    source, sink = height + width, height + width + 1
    starts = np.concatenate([np.where(back, height + columns, rows), np.full(len(alone), source), height + unused])
    ends = np.concatenate([np.where(back, rows, height + columns), alone, np.full(len(unused), sink)])
    ones = np.ones(len(starts), dtype=np.int32)
    capacity = csr_array((ones, (starts.astype(np.int32), ends.astype(np.int32))), shape=(sink + 1, sink + 1))
    flow = maximum_flow(capacity, source, sink).flow
    paths = flow.indptr[: height + 1]
    used = np.flatnonzero(flow.data[: paths[-1]] > 0)
    mates = mates.copy()
    mates[np.searchsorted(paths, used, side="right") - 1] = flow.indices[used] - height
    return mates


def contested(
    rows: np.ndarray, columns: np.ndarray, mates: np.ndarray, covered: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Groups of columns of which a largest matching can cover only some: (edges, sorted columns) of each.

    These are the columns that alternating paths reach from an uncovered one (Dulmage and Mendelsohn 1958). All other columns
    that can be covered are covered by every largest matching, and every row next to a group is paired within it.
    """
    width = len(covered)
    unused = np.flatnonzero(~covered)
    onward = np.flatnonzero(mates[rows] >= 0)
    starts = np.concatenate([columns[onward], np.full(len(unused), width)])
    ends = np.concatenate([mates[rows[onward]], unused])
    steps = csr_array((np.ones(len(starts)), (starts, ends)), shape=(width + 1, width + 1))
    reached = np.zeros(width + 1, dtype=bool)
    reached[breadth_first_order(steps, width, return_predecessors=False)] = True
    edges = np.flatnonzero(reached[columns])
    if not len(edges):
        return []
    links = csr_array((np.ones(len(edges)), (columns[edges], mates[rows[edges]])), shape=(width, width))
    group = connected_components(links, directed=False)[1]
    edges = edges[np.argsort(group[columns[edges]], kind="stable")]
    present = np.zeros(width, dtype=bool)
    present[columns[edges]] = True
    members = np.flatnonzero(present)
    members = members[np.argsort(group[members], kind="stable")]
    split = [
        np.split(part, np.flatnonzero(np.diff(group[of])) + 1)
        for part, of in ((edges, columns[edges]), (members, members))
    ]
    return list(zip(*split, strict=True))


def nearest_columns(rows: np.ndarray, columns: np.ndarray, costs: np.ndarray, width: int) -> np.ndarray:
    """(width,) bool: the columns covered by the matching of least total cost that pairs every row; one must exist.

    rows: sorted, not necessarily all numbers up to the largest.
    """
    rows = np.cumsum(np.diff(rows, prepend=rows[0]) > 0)
    graph = csr_array((costs + 1, (rows, columns)), shape=(rows[-1] + 1, width))  # a stored zero would be no edge
    covered = np.zeros(width, dtype=bool)
    covered[min_weight_full_bipartite_matching(graph)[1]] = True
    return covered
