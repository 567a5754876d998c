"""Scan orders as pictures: the curve drawn is the curve scanned."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from pamm.look import LookError
from pamm.look.scans import KNOWN, MARGIN, cell_side, draw_scan, jumps, name_of, orders_of, rank_colours, scan_figure
from pamm.nn.serialize import CURVES, MOST_ORDERS, row_column_orders, scan_orders

GRIDS = [(8, 8), (5, 3), (7, 12)]


def test_orders_are_those_of_the_networks():
    for curve in CURVES:
        count = MOST_ORDERS[curve]
        assert np.array_equal(orders_of(curve, 5, 7, count), scan_orders(curve, 5, 7, count).numpy())
    assert np.array_equal(orders_of("cross", 5, 7), row_column_orders(5, 7).numpy())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("curve", KNOWN)
def test_the_picture_shows_every_token_once_in_its_rank_s_colour(curve, grid):
    """Read back from the pixels: a token's centre has the colour of its rank; the first and last carry marks."""
    height, width = grid
    for order in orders_of(curve, *grid):
        pixels = np.asarray(draw_scan(order, *grid, side=400), int)
        cell = cell_side(*grid, 400)
        rows, columns = (MARGIN + cell * p + cell // 2 for p in (order // width, order % width))
        expected = rank_colours(height * width)
        difference = np.abs(pixels[rows, columns] - expected).max(1)
        assert difference[:-1].max() <= 24  # a neighbour's colour and the antialiasing touch the centre
        assert (pixels[rows[-1], columns[-1]] == 255).all()


@pytest.mark.parametrize("curve", sorted(CURVES))
def test_neighbouring_ranks_are_joined_where_they_are_neighbours(curve):
    order = orders_of(curve, 8, 8, 1)[0]
    pixels, cell = np.asarray(draw_scan(order, 8, 8, side=400), int), cell_side(8, 8, 400)
    centres, colours = np.stack([order // 8, order % 8], 1) * cell + MARGIN + cell // 2, rank_colours(64)
    for rank, (a, b) in enumerate(pairwise(centres)):
        if np.abs(a - b).sum() == cell:
            assert np.abs(pixels[tuple((a + b) // 2)] - colours[rank]).max() <= 24


def test_picture_has_the_promised_size():
    assert draw_scan(orders_of("snake", 6, 12)[0], 6, 12, side=240).size == (240 + 2 * MARGIN, 120 + 2 * MARGIN)
    assert draw_scan(orders_of("snake", 3, 200)[0], 3, 200, side=240).size == (800 + 2 * MARGIN, 12 + 2 * MARGIN)


def test_names_tell_the_turns():
    """Order k of Hilbert is the first one turned counter-clockwise by 90° k times."""
    ranks = [np.argsort(order).reshape(8, 8) for order in orders_of("hilbert", 8, 8)]
    for k, turn in enumerate(("0°", "90°", "180°", "270°")):
        assert np.array_equal(ranks[k], np.rot90(ranks[0], k))
        assert name_of("hilbert", k) == turn
    assert np.array_equal(orders_of("snake", 4, 5)[2], orders_of("snake", 4, 5)[0][::-1])
    assert name_of("snake", 2) == "rows, backwards"


def test_jumps_are_counted():
    assert [jumps(order, 36) for order in orders_of("hilbert", 28, 36)] == [3, 6, 4, 4]
    assert [jumps(order, 5) for order in orders_of("cross", 4, 5)] == [3, 4, 3, 4]
    assert [jumps(order, 5) for order in orders_of("snake", 4, 5)] == [0, 0, 0, 0]


def test_a_figure_holds_a_row_per_curve():
    one, orders = scan_figure(["hilbert"], (4, 6), tile=100)
    two, _ = scan_figure(["hilbert", "morton"], (4, 6), tile=100)
    assert list(orders) == ["hilbert"] and orders["hilbert"].shape == (4, 24)
    assert two.width == one.width and two.height > one.height + 60


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (256, 2)], ids=str)
def test_odd_grids_are_drawn(grid):
    assert scan_figure(KNOWN, grid, tile=80)[0].width > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("peano", 4, 4), "unknown scan curve 'peano'; choose among hilbert, "),
        (("hilbert", 0, 4), "a grid of 0 x 4 tokens: expected sides of 1 to 256, e.g. --grid 32 32"),
        (("hilbert", 4, 300), "expected sides of 1 to 256"),
        (("hilbert", 4, 4, 9), "found 9 orders, expected 1 to 8"),
        (("morton-released", 4, 4, 5), "found 5 orders, expected 1 to 4 for 'morton-released'"),
        (("cross", 4, 4, 5), "found 5 orders, expected 1 to 4 for 'cross'"),
    ],
)
def test_senseless_arguments_are_told(arguments, message):
    with pytest.raises(LookError, match=message):
        orders_of(*arguments)


def test_no_order_no_picture():
    with pytest.raises(LookError, match="visits each of 2 x 2 tokens once"):
        draw_scan(np.array([0, 1, 1, 3]), 2, 2)
