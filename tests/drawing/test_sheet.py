"""Pictures side by side say what their colours mean: a bar in the map's unit below every map whose colours follow a range."""

from __future__ import annotations

import numpy as np
import pytest

from pamm.drawing.sheet import Subject, contact_sheet
from pamm.look.predictions import compare
from pamm.prediction import Maps
from pamm.tasks import Task, create_task

DEPTH = create_task("depth")


def ramp(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 96 * 64, dtype=np.float32).reshape(64, 96)


def maps(low: float, high: float) -> Maps:
    return Maps(np.zeros((64, 96, 3), np.uint8), {"depth": ramp(low, high)}, {"depth": DEPTH})


class Known:
    """A predictor that gives one map."""

    def __init__(self, low: float, high: float):
        self.values = low, high
        self.tasks: dict[str, Task] = {"depth": DEPTH}

    def __call__(self, image: np.ndarray) -> Maps:
        return maps(*self.values)


def bars(picture: np.ndarray) -> int:
    """Bars in a picture: rows of pixels that hold viridis from its first to its last colour, monotonously, counted in blocks."""
    ends = DEPTH.draw(np.array([[1.0, 2.0]]))[0]
    found = []
    for row in picture:
        first, last = (np.flatnonzero((row == end).all(-1)) for end in ends)
        found.append(
            bool(
                len(first)
                and len(last)
                and last[0] - first[0] >= 60
                and (np.diff(row[first[0] : last[0], 1].astype(int)) <= 0).all()
            )
        )
    return int((np.diff(np.array([False, *found], int)) == 1).sum())


def test_every_depth_map_of_a_contact_sheet_has_its_own_bar():
    sheet = np.asarray(contact_sheet([("near", maps(0.5, 2.0)), ("far", maps(5.0, 50.0))], tile=96))
    assert bars(sheet) == 2
    one, other = (np.asarray(contact_sheet([("a", maps(0.5, high))], tile=96)) for high in (2.0, 4.0))
    assert one.shape == other.shape and (one != other).any()  # the same pictures, other numbers


def test_an_unknown_depth_map_has_no_bar():
    empty = Maps(np.zeros((64, 96, 3), np.uint8), {"depth": np.zeros((64, 96), np.float32)}, {"depth": DEPTH})
    assert bars(np.asarray(contact_sheet([("a", empty)], tile=96))) == 0


@pytest.mark.parametrize("with_truth", [False, True])
def test_models_and_truth_share_a_bar(with_truth):
    truth = {"depth": ramp(1, 3)}
    known = {"depth": np.ones((64, 96), bool)}
    subject = Subject("a", np.zeros((64, 96, 3), np.uint8), *((truth, known, {"depth": DEPTH}) if with_truth else ()))
    pictures = [
        np.asarray(compare({"a": Known(1, 2), "b": Known(*other)}, [subject], ["depth"], tile=120))
        for other in ((1, 4), (1, 8))
    ]
    assert [bars(picture) for picture in pictures] == [1, 1]
    # with a truth its range is told, whatever the models say; without one, that of all models
    below = [picture[-110:] for picture in pictures]
    assert (below[0] != below[1]).any() != with_truth
