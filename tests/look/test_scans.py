"""Scan orders as pictures: the curve drawn is the curve scanned."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pamm.look import LookError
from pamm.look.scans import CROSS, draw_scan, jumps, name_of, orders_of, rank_colours, scan_figure
from pamm.nn.serialize import CURVES, MOST_ORDERS, row_column_orders, scan_orders

GRIDS = [(8, 8), (5, 3), (7, 12)]


class Drawn:
    """A scan's picture, read at places of the grid."""

    def __init__(self, order: np.ndarray, height: int, width: int):
        figure = Figure((4, 4), dpi=100)
        self.axes = figure.add_axes((0.05, 0.05, 0.9, 0.9))
        draw_scan(self.axes, order, height, width, cell=360 / max(height, width))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self.pixels = np.asarray(canvas.buffer_rgba())[::-1, :, :3].astype(int)  # rows from below, as the axes count

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        columns, rows = self.axes.transData.transform(np.stack([x, y], -1)).T.astype(int)
        return self.pixels[rows, columns]


def test_orders_are_those_of_the_networks():
    for curve in CURVES:
        count = MOST_ORDERS[curve]
        assert np.array_equal(orders_of(curve, 5, 7, count), scan_orders(curve, 5, 7, count).numpy())
    assert np.array_equal(orders_of("cross", 5, 7), row_column_orders(5, 7).numpy())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("curve", [*CURVES, CROSS])
def test_the_picture_shows_every_token_once_in_its_rank_s_colour(curve, grid):
    """Read back from the pixels: a token's centre has the colour of its rank; the first and last carry marks."""
    height, width = grid
    for order in orders_of(curve, *grid):
        found = Drawn(order, height, width)(order % width, order // width)
        expected = rank_colours(height * width)
        assert (
            np.abs(found - expected).max(1)[:-1].max() <= 24
        )  # a neighbour's colour and the antialiasing touch the centre
        assert (found[-1] == 255).all()


@pytest.mark.parametrize("curve", sorted(CURVES))
def test_neighbouring_ranks_are_joined_where_they_are_neighbours(curve):
    order = orders_of(curve, 8, 8, 1)[0]
    drawn, colours = Drawn(order, 8, 8), rank_colours(64)
    places = np.stack([order % 8, order // 8], 1)
    for rank, (a, b) in enumerate(pairwise(places)):
        if np.abs(a - b).sum() == 1:
            assert np.abs(drawn(*((a + b) / 2)) - colours[rank]).max() <= 24


@pytest.mark.parametrize(("grid", "longest"), [((6, 12), 240), ((3, 100), 400)], ids=str)
def test_picture_has_the_promised_size(grid, longest):
    figure, _ = scan_figure(["snake"], grid, count=2, tile=240)
    FigureCanvasAgg(figure).draw()
    assert figure.axes[0].get_window_extent().width == pytest.approx(longest, rel=0.1)


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
    figure, orders = scan_figure(["hilbert", "cross"], (4, 6), tile=100)
    assert list(orders) == ["hilbert", "cross"] and orders["hilbert"].shape == (4, 24)
    assert [axes.get_ylabel() for axes in figure.axes[::4]] == ["hilbert", "cross"]
    assert figure.axes[1].get_title() == "order 2" and figure.axes[7].get_xlabel() == "columns, backwards; 5 jumps"


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (256, 2)], ids=str)
def test_odd_grids_are_drawn(grid):
    figure, _ = scan_figure(["hilbert", "cross"], grid, tile=80)
    FigureCanvasAgg(figure).draw()
    assert len(figure.axes) == 8


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
        draw_scan(Figure().subplots(), np.array([0, 1, 1, 3]), 2, 2)
