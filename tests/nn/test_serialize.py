"""Scan orders: published test vectors, golden arrays, and what every curve must hold to."""

import pytest
import torch

import golden
from pamm.nn.serialize import CURVES, MOST_ORDERS, row_column_orders, scan_orders

HILBERT_4X4 = [
    [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3],
    [12, 8, 9, 13, 14, 15, 11, 10, 6, 7, 3, 2, 1, 5, 4, 0],
    [15, 14, 10, 11, 7, 3, 2, 6, 5, 1, 0, 4, 8, 9, 13, 12],
    [3, 7, 6, 2, 1, 0, 4, 5, 9, 8, 12, 13, 14, 10, 11, 15],
]
HILBERT_STARTS = {
    (32, 32): [
        [0, 32, 33, 1, 2, 3, 35, 34],
        [992, 993, 961, 960, 928, 896, 897, 929],
        [1023, 991, 990, 1022, 1021, 1020, 988, 989],
        [31, 30, 62, 63, 95, 127, 126, 94],
    ],
    (28, 36): [
        [0, 1, 37, 36, 72, 108, 109, 73],
        [899, 898, 934, 935, 971, 1007, 1006, 970],
        [143, 142, 106, 107, 71, 35, 34, 70],
        [1004, 968, 969, 1005, 1006, 1007, 971, 970],
    ],
}


def jumps(order: torch.Tensor, width: int) -> int:
    """Number of consecutive positions that are no neighbours on the map."""
    steps = (order // width).diff().abs() + (order % width).diff().abs()
    return int((steps != 1).sum())


def test_hilbert_vectors_of_a_4x4_map():
    assert scan_orders("hilbert", 4, 4).tolist() == HILBERT_4X4


@pytest.mark.parametrize("size", HILBERT_STARTS, ids=lambda s: f"{s[0]}x{s[1]}")
def test_hilbert_starts_at_the_papers_grids(size):
    assert scan_orders("hilbert", *size)[:, :8].tolist() == HILBERT_STARTS[size]


def test_hilbert_is_continuous_on_squares_and_jumps_only_where_cropped():
    assert [jumps(order, 32) for order in scan_orders("hilbert", 32, 32)] == [0, 0, 0, 0]
    assert [jumps(order, 36) for order in scan_orders("hilbert", 28, 36)] == [3, 6, 4, 4]


@pytest.mark.parametrize(
    ("name", "scan"),
    [
        ("pamm_released_pascal", "hilbert"),
        ("pamm_released_nyud", "hilbert"),
        ("pamm_released_pascal_z", "morton-released"),
    ],
)
def test_orders_equal_the_published_implementation(name, scan):
    case = golden.GoldenCase(name)
    orders = scan_orders(scan, *(side // 16 for side in case.image_size))
    assert len(orders) == len(case.maps("order/"))
    assert all(case.deviation(f"order/{k}", order) == 0 for k, order in enumerate(orders))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (5, 3), (8, 8), (9, 17)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", sorted(CURVES))
def test_every_order_visits_every_position_once(name, size):
    count = MOST_ORDERS[name]
    orders = scan_orders(name, *size, count=count)
    assert orders.dtype == torch.int64
    assert orders.shape == (count, size[0] * size[1])
    assert torch.equal(orders.sort(1).values, torch.arange(size[0] * size[1]).expand(count, -1))


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (8, 8), (28, 36)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", sorted(CURVES))
def test_orders_are_distinct(name, size):
    count = MOST_ORDERS[name]
    assert len(scan_orders(name, *size, count=count).unique(dim=0)) == count


@pytest.mark.parametrize("name", sorted(CURVES))
def test_fewer_orders_are_the_first_ones(name):
    every = scan_orders(name, 5, 6, count=MOST_ORDERS[name])
    for count in range(1, MOST_ORDERS[name]):
        assert torch.equal(scan_orders(name, 5, 6, count=count), every[:count])


GRIDS = [(28, 36), (36, 28), (5, 7), (7, 5), (1, 1), (1, 9), (9, 1), (2, 3), (8, 8), (32, 32), (6, 6), (4, 6), (17, 3)]


def interleaved(row: int, column: int) -> int:
    """The Morton code by its definition: binary digits of row and column in turn, the column's last."""
    return int("".join(r + c for r, c in zip(f"{row:012b}", f"{column:012b}", strict=True)), 2)


def published_ranks(curve: str, side: int) -> list[list[int]]:
    """The published code's square of ranks, position by position."""
    if curve == "morton-released":
        return [[interleaved(row, column) for column in range(side)] for row in range(side)]
    lines = [list(range(row * side, (row + 1) * side)) for row in range(side)]
    return [line if row % 2 == 0 else line[::-1] for row, line in enumerate(lines)]


@pytest.mark.parametrize("size", GRIDS, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("curve", ["snake-released", "morton-released"])
def test_released_orders_follow_the_published_construction(curve, size):
    """A square as large as the longer side, quarter turns counter-clockwise, the top left corner, sorted by rank."""
    height, width = size
    ranks = published_ranks(curve, max(size))
    for order in scan_orders(curve, height, width).tolist():
        places = [(ranks[row][column], row * width + column) for row in range(height) for column in range(width)]
        assert order == [position for _, position in sorted(places)]
        ranks = [list(column) for column in zip(*ranks, strict=True)][::-1]  # what was the right side is the top


@pytest.mark.parametrize("size", GRIDS, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_papers_crop_keeps_the_bottom_left_of_the_same_curve(size):
    """The whole square's orders with what lies above and to the right of the map left out."""
    height, width = size
    side = 1 << (max(size) - 1).bit_length()
    found = scan_orders("hilbert-bottom-left", height, width, 8)
    for whole, order in zip(scan_orders("hilbert", side, side, 8).tolist(), found.tolist(), strict=True):
        places = [(position // side - (side - height), position % side) for position in whole]
        assert order == [row * width + column for row, column in places if row >= 0 and column < width]
    if height == side or size == (28, 36):
        assert torch.equal(found, scan_orders("hilbert", *size, 8)) == (height == side)


def test_released_orders_by_hand():
    assert scan_orders("snake-released", 2, 3).tolist() == [
        [0, 1, 2, 5, 4, 3],
        [3, 0, 1, 4, 5, 2],
        [3, 4, 5, 2, 1, 0],
        [2, 5, 4, 1, 0, 3],
    ]
    assert scan_orders("morton-released", 2, 3)[1].tolist() == [3, 4, 0, 1, 5, 2]


@pytest.mark.parametrize("side", [1, 2, 8, 32])
def test_released_z_is_the_papers_on_squares_of_a_power_of_two_alone(side):
    assert torch.equal(scan_orders("morton-released", side, side), scan_orders("morton", side, side))
    assert not torch.equal(scan_orders("morton-released", 28, 36), scan_orders("morton", 28, 36))


def test_snake_walks_rows_then_columns_then_both_backwards():
    rows, columns, rows_back, columns_back = scan_orders("snake", 2, 3).tolist()
    assert rows == [0, 1, 2, 5, 4, 3]
    assert columns == [0, 3, 4, 1, 2, 5]
    assert (rows_back, columns_back) == (rows[::-1], columns[::-1])


@pytest.mark.parametrize("size", [(3, 5), (28, 36)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_snake_never_jumps(size):
    assert [jumps(order, size[1]) for order in scan_orders("snake", *size, count=8)] == [0] * 8


def test_morton_is_the_z_of_every_2x2_block():
    first, turned, *_ = scan_orders("morton", 4, 4).tolist()
    assert first == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert turned[:4] == [12, 8, 13, 9]


def test_row_column_orders_are_the_four_raster_directions():
    assert row_column_orders(2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


def test_a_changed_result_does_not_change_the_next_one():
    scan_orders("hilbert", 4, 4).zero_()
    assert scan_orders("hilbert", 4, 4).tolist() == HILBERT_4X4


def test_orders_made_under_inference_mode_serve_training_later():
    with torch.inference_mode():
        scan_orders("hilbert", 3, 11)
    assert not scan_orders("hilbert", 3, 11).is_inference()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("peano", 4, 4, 4),
            "unknown scan curve 'peano'; known curves: hilbert, hilbert-bottom-left, morton, morton-released, snake",
        ),
        (("hilbert", 4, 4, 9), "found 9 scan orders, expected 1 to 8"),
        (("snake-released", 4, 4, 5), "found 5 scan orders, expected 1 to 4, which the curve 'snake-released' has"),
        (("hilbert", 0, 4, 4), "found a map of 0×4"),
    ],
)
def test_errors_name_what_was_found(arguments, message):
    with pytest.raises(ValueError, match=message):
        scan_orders(*arguments)
