"""Scan orders: the orders in which the positions of a two-dimensional map form a sequence.

An order lists the row-major positions i·W + j of an H×W map as they are visited.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

ScanCurve = Callable[[int, int], list[np.ndarray]]
CURVES: dict[str, ScanCurve] = {}
"""Every scan curve, by name: (height, width) → its orders."""

MOST_ORDERS: dict[str, int] = {}
"""Scan curve → how many orders it offers."""


def curve(name: str, *, orders: int) -> Callable[[ScanCurve], ScanCurve]:
    """Decorator that makes a scan curve available under a name.

    Args:
        name: name of the curve.
        orders: number of its orders.

    Returns:
        The decorator.
    """

    def register(function: ScanCurve) -> ScanCurve:
        CURVES[name], MOST_ORDERS[name] = function, orders
        return function

    return register


@torch.compiler.assume_constant_result
def scan_orders(name: str, height: int, width: int, count: int = 4) -> Tensor:
    """The first scan orders of a curve over a map (PAMM, paper eq. 17). A compiled graph holds them as a constant.

    - "hilbert" (H-scan): the Hilbert curve of the smallest power of two that covers the map, turned by 0°, 90°, 180° and 270°
      counter-clockwise and cropped to the map's top left. Orders 5 to 8 are these backwards.
    - "hilbert-bottom-left": as "hilbert", cropped to the bottom left.
    - "morton" (Z-scan): turned and cropped as "hilbert".
    - "snake" (S-scan): along rows, along columns, and both backwards.
    - "snake-released", "morton-released": the S- and Z-scan of PAMM's published code, which turns and crops a square as large as
      the map's longer side. They have four orders. The published H-scan is "hilbert".

    The first four orders of Morton and snake include their reversals, so their orders 5 to 8 are the mirrored curves.

    Args:
        name: name of a curve.
        height: rows of the map.
        width: columns of the map.
        count: number of orders.

    Returns:
        (count, height·width) int64: row-major positions in the order of the scan.

    Raises:
        ValueError: an unknown curve, an empty map, or a count outside 1 to the number of the curve's orders.
    """
    if name not in CURVES:
        raise ValueError(f"unknown scan curve '{name}'; known curves: {', '.join(sorted(CURVES))}")
    if not 1 <= count <= MOST_ORDERS[name]:
        raise ValueError(f"found {count} scan orders, expected 1 to {MOST_ORDERS[name]}, which the curve '{name}' has")
    if height < 1 or width < 1:
        raise ValueError(f"found a map of {height}×{width} positions, expected at least 1×1")
    return torch.from_numpy(_all_orders(name, height, width)[:count].copy())


def row_column_orders(height: int, width: int) -> Tensor:
    """Row by row, column by column, and both backwards (the cross-scan of MTMamba): LongTensor (4, height·width)."""
    index = _index(height, width)
    rows, columns = index.flatten(), index.T.flatten()
    return torch.from_numpy(np.stack([rows, columns, rows[::-1], columns[::-1]]))


@lru_cache(maxsize=64)
def _all_orders(name: str, height: int, width: int) -> np.ndarray:
    """All orders of the curve, (K, height·width) int64. An array, so that no tensor mode leaks into the cache."""
    return np.stack(CURVES[name](height, width)).astype(np.int64)


def _index(height: int, width: int) -> np.ndarray:
    return np.arange(height * width, dtype=np.int64).reshape(height, width)


def _square(height: int, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Columns, rows and bits of the smallest square of 2^bits positions a side that covers the map."""
    bits = (max(height, width) - 1).bit_length()
    y, x = np.mgrid[: 1 << bits, : 1 << bits]
    return x, y, bits


def _turned(square: np.ndarray, height: int, width: int, *, top: int = 0) -> list[np.ndarray]:
    """Orders of a square of ranks in its four rotations, cropped to the map: on the left, from row `top` on."""
    turned = (np.rot90(square, turns)[top : top + height, :width] for turns in range(4))
    return [np.argsort(ranks, axis=None, kind="stable") for ranks in turned]


@curve("hilbert", orders=8)
def _hilbert(height: int, width: int) -> list[np.ndarray]:
    orders = _turned(_hilbert_rank(*_square(height, width)), height, width)
    return [*orders, *(order[::-1] for order in orders)]


@curve("hilbert-bottom-left", orders=8)
def _hilbert_bottom_left(height: int, width: int) -> list[np.ndarray]:
    square = _hilbert_rank(*_square(height, width))
    orders = _turned(square, height, width, top=len(square) - height)
    return [*orders, *(order[::-1] for order in orders)]


@curve("morton", orders=8)
def _morton(height: int, width: int) -> list[np.ndarray]:
    square = _morton_rank(*_square(height, width))
    return [*_turned(square, height, width), *_turned(np.fliplr(square), height, width)]


@curve("snake", orders=8)
def _snake(height: int, width: int) -> list[np.ndarray]:
    index = _index(height, width)

    def walk(grid: np.ndarray) -> np.ndarray:
        lines = grid.copy()
        lines[1::2] = lines[1::2, ::-1]
        return lines.flatten()

    first = [walk(index), walk(index.T)]
    opposite = [walk(index[:, ::-1]), walk(index.T[:, ::-1])]
    return [*first, *(o[::-1] for o in first), *opposite, *(o[::-1] for o in opposite)]


@curve("snake-released", orders=4)
def _snake_released(height: int, width: int) -> list[np.ndarray]:
    side = max(height, width)
    rank = _index(side, side)
    rank[1::2] = rank[1::2, ::-1].copy()
    return _turned(rank, height, width)


@curve("morton-released", orders=4)
def _morton_released(height: int, width: int) -> list[np.ndarray]:
    side = max(height, width)
    return _turned(_morton_rank(*_square(height, width))[:side, :side], height, width)


def _hilbert_rank(x: np.ndarray, y: np.ndarray, bits: int) -> np.ndarray:
    """Distance of (x, y) along the Hilbert curve, one quadrant after another from the largest down."""
    rank = np.zeros_like(x)
    for bit in reversed(range(bits)):
        right, lower = (x >> bit) & 1, (y >> bit) & 1
        rank += ((3 * right) ^ lower) << (2 * bit)
        side = (1 << bit) - 1
        x, y = x & side, y & side
        # Quadrants of the upper half hold the curve transposed, the right one also point-mirrored.
        mirror = (lower == 0) & (right == 1)
        x, y = np.where(mirror, side - x, x), np.where(mirror, side - y, y)
        x, y = np.where(lower == 0, y, x), np.where(lower == 0, x, y)
    return rank


def _morton_rank(x: np.ndarray, y: np.ndarray, bits: int) -> np.ndarray:
    """Z-order: the bits of row and column interleaved."""
    rank = np.zeros_like(x)
    for bit in range(bits):
        rank |= ((x >> bit) & 1) << (2 * bit) | ((y >> bit) & 1) << (2 * bit + 1)
    return rank
