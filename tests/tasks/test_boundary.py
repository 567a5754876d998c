"""The boundary benchmark on one image: its parts against libraries and loops (tests/test_boundaries.py has its reference)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation
from scipy.optimize import linear_sum_assignment
from skimage.morphology import thin as skimage_thin

from pamm.tasks import create_task
from pamm.tasks.boundary import PROTOCOLS, average_precision, counts, f_measure
from pamm.tasks.metrics.correspondence import label_boundaries, suppress, thin, triangle
from pamm.tasks.metrics.matching import Matcher

HUNDREDTHS = np.arange(1, 100) / 100


def blobs(seed: int, size: tuple[int, int] = (61, 83)) -> np.ndarray:
    """A smooth random map with values from 0 to 1."""
    values = triangle(np.random.default_rng(seed).random(size), 5)
    return (values - values.min()) / np.ptp(values)


# -- parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_thinning_equals_scikit_image(seed: int) -> None:
    values = blobs(seed)
    for threshold in (0.3, 0.5, 0.7):
        for mask in (values > threshold, np.random.default_rng(seed).random((40, 31)) > threshold):
            np.testing.assert_array_equal(thin(mask), skimage_thin(mask))


@pytest.mark.parametrize("value", [False, True])
def test_thinning_of_uniform_maps(value: bool) -> None:
    mask = np.full((9, 12), value)
    np.testing.assert_array_equal(thin(mask), skimage_thin(mask))


@pytest.mark.parametrize("reach", [0.0, 1.0, 2.3, 5.0])
def test_matched_pixels_are_as_many_as_an_assignment_finds(reach: float) -> None:
    size = (30, 41)
    generator = np.random.default_rng(3)
    probability = generator.random(size) * (generator.random(size) < 0.06)
    truth = generator.random(size) < 0.05
    thresholds = [0.1, 0.5, 0.9]
    cntR, sumR, cntP, sumP = counts(
        probability, [truth], thresholds=thresholds, max_distance=reach / math.hypot(*size) * (1 + 1e-9)
    )
    for k, threshold in enumerate(thresholds):
        predicted, true = (np.argwhere(mask) for mask in (skimage_thin(probability >= threshold), truth))
        near = ((predicted[:, None] - true[None]) ** 2).sum(-1) <= reach**2
        rows, columns = linear_sum_assignment(near, maximize=True)
        assert (cntR[k], sumR[k], cntP[k], sumP[k]) == (near[rows, columns].sum(), len(true), cntR[k], len(predicted))


@pytest.mark.parametrize("seed", range(6))
def test_the_matching_is_a_largest_one_of_least_distance(seed: int) -> None:
    """For maps one after the other, as their thresholds rise, against an assignment of the whole with a price for staying alone."""
    generator = np.random.default_rng(seed)
    shape, reach = (24, 31), 2.9
    truth, values = generator.random(shape) < 0.06, generator.random(shape)
    matcher = Matcher(truth, values >= 0.7, reach, nearest=True)
    contests = 0
    for threshold in (0.7, 0.8, 0.85, 0.9, 0.95, 0.99, 0.8):
        mask = values >= threshold
        predicted = np.flatnonzero(mask)
        column_of = np.full(mask.size, -1)
        column_of[predicted] = np.arange(len(predicted))
        right = matcher.match(predicted, column_of)
        distance = np.sqrt(((np.argwhere(truth)[:, None] - np.argwhere(mask)[None]) ** 2).sum(-1))
        prices = np.where(distance <= reach, distance, 1e4)
        best = prices[linear_sum_assignment(prices)]
        ours = prices[:, right][linear_sum_assignment(prices[:, right])]
        assert right.sum() == (best <= reach).sum() == (ours <= reach).sum()
        assert ours[ours <= reach].sum() == pytest.approx(best[best <= reach].sum(), rel=1e-12)
        contests += (distance.min(0) <= reach).sum() > right.sum()
    assert contests > 2


def test_a_threshold_counts_the_same_among_others_and_alone() -> None:
    truths = [triangle(np.random.default_rng(seed).random((61, 83)), 3) > 0.53 for seed in range(3)]
    truths = [skimage_thin(truth) for truth in truths]
    together = np.array(counts(blobs(1), truths, thresholds=HUNDREDTHS[::-3], max_distance=0.03))
    alone = [counts(blobs(1), truths, thresholds=[threshold], max_distance=0.03) for threshold in HUNDREDTHS[::-3]]
    np.testing.assert_array_equal(together, np.array(alone)[..., 0].T)


def test_a_pixel_is_right_that_any_annotator_marked() -> None:
    probability = np.zeros((20, 20))
    probability[5, 3:17] = 0.8
    upper, lower = (np.zeros((20, 20), bool) for _ in range(2))
    upper[5, 3:10], lower[5, 8:17] = True, True
    cntR, sumR, cntP, sumP = counts(probability, [upper, lower], thresholds=[0.5], max_distance=0)
    assert (cntR, sumR, cntP, sumP) == (16, 16, 14, 14)


def test_suppression_equals_a_loop_over_pixels() -> None:
    probability = blobs(7, (23, 31))
    found = suppress(probability, radius=2)
    height, width = probability.shape

    def ramp(position: int, side: int) -> float:
        return min(1.0, min(position, side - 1 - position) / 5)

    smooth = triangle(probability, 4)
    dy, dx = np.gradient(smooth)
    dxx, dyy, dxy = np.gradient(dx)[1], np.gradient(dy)[0], np.gradient(dy)[1]
    for y in range(height):
        for x in range(width):
            angle = math.atan(dyy[y, x] * np.sign(-dxy[y, x]) / (dxx[y, x] + 1e-5)) % math.pi
            value = probability[y, x]
            for step in (-2, -1, 1, 2):
                at = min(max(y + step * math.sin(angle), 0), height - 1.001), x + step * math.cos(angle)
                row, column = at[0], min(max(at[1], 0), width - 1.001)
                i, j = int(row), int(column)
                a, b = row - i, column - j
                four = probability[i : i + 2, j : j + 2]
                neighbour = (np.outer([1 - a, a], [1 - b, b]) * four).sum()
                if probability[y, x] * 1.01 < neighbour:
                    value = 0
            assert found[y, x] == pytest.approx(value * ramp(y, height) * ramp(x, width), abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_an_image_of_one_row_or_column_is_all_border(shape) -> None:
    assert not suppress(np.ones(shape), radius=1).any()


def test_suppression_leaves_the_ridge_of_a_wide_line() -> None:
    x = np.arange(60)
    line = np.exp(-(((x - 30) / 4) ** 2))[None].repeat(50, 0)
    kept = suppress(line, radius=1)[10:-10] > 0.1
    assert kept[:, 30].all()
    assert kept.sum() == kept[:, 30].sum()


def test_outline_of_labels_equals_a_loop() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (7, 9))
    expected = np.zeros(labels.shape, bool)
    for (y, x), value in np.ndenumerate(labels):
        near = [(min(y + dy, 6), min(x + dx, 8)) for dy, dx in ((0, 1), (1, 0), (1, 1))]
        expected[y, x] = any(labels[at] != value for at in near)
    np.testing.assert_array_equal(label_boundaries(labels), expected)


def test_average_precision_of_two_points() -> None:
    found = np.array([[80, 40], [100, 100], [40, 40], [80, 40]])  # recall .8 and .4, precision .5 and 1
    grid = [r / 100 for r in range(101)]
    expected = sum(1 - 0.5 * (r - 0.4) / 0.4 for r in grid if 0.4 <= r <= 0.8) / 100
    assert average_precision(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": np.full((4, 4), 200.0)}, "probability: found values from 200 to 200, expected 0 to 1"),
        ({"probability": np.full((4, 4), np.nan)}, "probability: found values from nan"),
        ({"probability": np.zeros(4)}, "probability: found shape"),
        ({"truths": []}, "truths: found shapes"),
        ({"truths": [np.zeros((4, 5), bool)]}, "truths: found shapes"),
        ({"thresholds": []}, "thresholds: found"),
        ({"max_distance": 7.5}, "max_distance: found 7.5, expected a fraction"),
    ],
)
def test_wrong_inputs_are_named(change: dict, message: str) -> None:
    given = {"probability": np.zeros((4, 4)), "truths": [np.zeros((4, 4), bool)], "thresholds": [0.5]}
    given = given | {"max_distance": 0.0075} | change
    with pytest.raises(ValueError, match=message):
        counts(given.pop("probability"), given.pop("truths"), **given)


# -- the task's metric -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_metric_adds_up_counts_of_cropped_images(protocol: str) -> None:
    """Padding is cut off before anything is measured, as the benchmarks cut it off the files they read."""
    rule = PROTOCOLS[protocol]
    task = create_task("edge", protocol=protocol, max_distance=0.02)
    label = torch.full((7, 1, 60, 80), 255, dtype=torch.uint8)
    logits = torch.randn(7, 1, 60, 80, generator=torch.Generator().manual_seed(0))
    total, best = 0, 0
    for i in range(7):
        frame = (i, 0, slice(3 + i, 55), slice(2, 70))
        values = blobs(i, (52 - i, 68))
        truth = skimage_thin(values > 0.5) & ~binary_dilation(values > 0.8)
        label[frame] = torch.from_numpy(truth.astype(np.uint8))
        logits[frame] = torch.from_numpy(8 * values - 4).float()
        stored = np.floor(255 * logits[frame].sigmoid().numpy()).astype(np.float64) / 255
        edges = suppress(stored, rule.radius, rule.smoothing)
        edges = np.rint(255 * edges) / 255 if rule.stored else edges
        levels = np.nextafter(rule.thresholds, 2) if rule.strict else rule.thresholds
        found = np.array(counts(edges, [skimage_thin(truth)], thresholds=levels, max_distance=0.02))
        total, best = total + found, best + found[:, f_measure(found).argmax()]
    metric = task.metric()
    metric.update(logits, label)
    scores = {name: float(value) for name, value in metric.compute().items()}
    expected = {"odsF": f_measure(total).max(), "oisF": f_measure(best), "AP": average_precision(total)}
    assert scores == pytest.approx({name: 100 * value for name, value in expected.items()}, rel=1e-12)
    assert 5 < scores["odsF"] < 100


def test_the_outline_of_a_region_is_the_truth_where_asked_for() -> None:
    label = torch.zeros(1, 1, 40, 50, dtype=torch.uint8)
    label[..., 10:30, 12:40] = 1
    line = torch.from_numpy(label_boundaries(label[0, 0].numpy()))
    scores = []
    for outline in (True, False):
        metric = create_task("edge", outline=outline, max_distance=0.02).metric()
        metric.update(torch.where(line, 8.0, -8.0)[None, None], label)
        scores.append(float(metric.compute()["odsF"]))
    assert scores[0] > 95
    assert scores[1] < 50


def test_unknown_protocols_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown protocol 'hed'; known protocols: bdet, seism, bsds"):
        create_task("edge", protocol="hed")
