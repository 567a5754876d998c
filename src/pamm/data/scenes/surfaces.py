"""Surfaces: procedural solid textures, random palettes and their evaluation at many points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

Generator = np.random.Generator


@dataclass(frozen=True)
class Surface:
    """How a solid looks: a pattern between two linear RGB albedos in [0, 1].

    basis (3, 3) maps a thing's own coordinates, metres, to pattern coordinates, whose period is 1; `offset` shifts them.
    gloss: strength of the highlight. emit: radiance added to the reflected light, in units of the albedo.
    """

    pattern: str
    first: np.ndarray
    second: np.ndarray
    basis: np.ndarray
    offset: np.ndarray
    gloss: float = 0.0
    emit: float = 0.0


def color(rng: Generator, vivid: float | None = None) -> np.ndarray:
    """A random linear RGB albedo. `vivid` in [0, 1] is its saturation; by default most colours are muted, some vivid."""
    saturation = rng.beta(0.8, 1.6) if vivid is None else vivid
    hue = rng.random() + np.array([0, 1 / 3, 2 / 3])
    chroma = 0.5 + 0.5 * np.cos(2 * np.pi * hue)
    lightness = rng.uniform(0.12, 0.85)
    return np.clip(lightness * (1 - saturation + saturation * chroma * 1.6), 0.03, 0.92)


def surface(
    rng: Generator,
    patterns: Sequence[str] = ("plain",),
    *,
    period: tuple[float, float] = (0.05, 0.3),
    axes: str = "xyz",
    first: np.ndarray | None = None,
    contrast: float | None = None,
    gloss: float | None = None,
    emit: float = 0.0,
) -> Surface:
    """A random surface with one of the patterns; `axes` names which axis of the thing is the pattern's first, second, third.

    `contrast` in [0, 1]: how far the second colour may lie from the first.
    """
    pattern = patterns[int(rng.integers(len(patterns)))]
    first = color(rng) if first is None else first
    contrast = rng.uniform(0.2, 0.9) if contrast is None else contrast
    second = first + contrast * (color(rng) - first)
    size = rng.uniform(*period) * ASPECT.get(pattern, np.ones(3))
    basis = np.eye(3)[["xyz".index(axis) for axis in axes]] / size[:, None]
    gloss = float(rng.choice([0, 0, 0.15, 0.4])) if gloss is None else gloss
    return Surface(pattern, first, second, basis, rng.uniform(-20, 20, 3), gloss, emit)


def plain(rng: Generator, first: np.ndarray | None = None, *, gloss: float | None = None, emit: float = 0.0) -> Surface:
    """A surface of one colour."""
    return surface(rng, first=first, gloss=gloss, emit=emit)


def wood(rng: Generator, axes: str = "xyz") -> Surface:
    """Brown to pale wood, or paint of any colour."""
    if rng.random() < 0.35:
        return plain(rng)
    tint = np.array([0.55, 0.33, 0.17]) * rng.uniform(0.25, 1.5) + rng.uniform(0, 0.1, 3)
    return surface(rng, ["wood"], axes=axes, period=(0.15, 0.4), first=np.clip(tint, 0.03, 0.9), contrast=0.35)


def fabric(rng: Generator) -> Surface:
    """Cloth: plain, speckled, striped, checked or dotted."""
    return surface(rng, ["plain", "plain", "speckle", "stripes", "checks", "dots"], period=(0.06, 0.25), gloss=0.0)


ASPECT = {
    "planks": np.array([6.0, 1.0, 1.0]),
    "bricks": np.array([2.0, 1.0, 1.0]),
    "wood": np.array([5.0, 1.0, 1.0]),
}
"""Pattern → extent of its period along the three axes."""

SIDE = 256


@cache
def _noise_table() -> np.ndarray:
    """(256, 256) periodic noise in [0, 1]: an even mixture of five octaves, the coarsest with the period 8."""
    rng = np.random.default_rng(0x5EED)
    total = np.zeros((SIDE, SIDE))
    for octave in range(5):
        cells = 8 << octave
        lattice = rng.random((cells, cells))
        at = np.arange(SIDE) * cells / SIDE
        low, weight = at.astype(int), at % 1
        weight = weight * weight * (3 - 2 * weight)
        high = (low + 1) % cells
        rows = lattice[low] * (1 - weight)[:, None] + lattice[high] * weight[:, None]
        total += (rows[:, low] * (1 - weight) + rows[:, high] * weight) * 0.6**octave
    low, high = np.quantile(total, [0.02, 0.98])
    return np.clip((total - low) / (high - low), 0, 1).astype(np.float32)


def noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Smooth noise in [0, 1] whose coarsest cells have the size 1."""
    row = (u * (SIDE // 8)).astype(np.int32) & (SIDE - 1)
    column = (v * (SIDE // 8)).astype(np.int32) & (SIDE - 1)
    return _noise_table()[row, column]


def _step(value: np.ndarray, threshold: float, width: float = 0.04) -> np.ndarray:
    return np.clip((value - threshold) / width + 0.5, 0, 1)


def _cell_tint(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """A number in [0, 1) per lattice cell."""
    mixed = row.astype(np.int32) * 7919 + column.astype(np.int32) * 104729
    return ((mixed * 2654435) & 1023).astype(np.float32) / 1024


def _laid(q: np.ndarray, shift: float, joint: float) -> np.ndarray:
    """Tiles in rows, each row shifted by `shift` from the one before, with joints in the second colour."""
    row = np.floor(q[:, 1])
    along = q[:, 0] + row * shift
    column = np.floor(along)
    gap = np.minimum.reduce([along - column, q[:, 1] - row])
    return np.maximum(0.4 * _cell_tint(row, column), 1 - _step(gap, joint, joint))


def _plain(q: np.ndarray) -> np.ndarray:
    return np.zeros(len(q), np.float32)


def _speckle(q: np.ndarray) -> np.ndarray:
    return noise(q[:, 0] * 2 + q[:, 2] * 1.7, q[:, 1] * 2 + q[:, 2])


def _stripes(q: np.ndarray) -> np.ndarray:
    return _step(np.abs(q[:, 0] % 1 - 0.5), 0.25, 0.05)


def _checks(q: np.ndarray) -> np.ndarray:
    return np.floor(q).sum(axis=1) % 2


def _dots(q: np.ndarray) -> np.ndarray:
    return 1 - _step(((q % 1 - 0.5) ** 2).sum(axis=1), 0.12, 0.03)


def _tiles(q: np.ndarray) -> np.ndarray:
    return _laid(q, 0.0, 0.04)


def _bricks(q: np.ndarray) -> np.ndarray:
    return _laid(q, 0.5, 0.08)


def _planks(q: np.ndarray) -> np.ndarray:
    return 0.75 * _laid(q, 0.37, 0.02) + 0.25 * _wood(q)


def _wood(q: np.ndarray) -> np.ndarray:
    return noise(q[:, 0] + q[:, 2], 4 * q[:, 1] + q[:, 2])


def _marble(q: np.ndarray) -> np.ndarray:
    cloud = noise(q[:, 0] + q[:, 2], q[:, 1] + 0.7 * q[:, 2])
    return 0.5 + 0.5 * np.sin(9 * cloud + 2 * q[:, 0])


def _view(q: np.ndarray) -> np.ndarray:
    """Outdoors seen through a window: 0 is land, rising to 1 in the sky above an uneven horizon."""
    horizon = 0.25 + 0.4 * noise(q[:, 0] * 0.9, np.zeros_like(q[:, 0]))
    return np.clip((q[:, 1] % 1 - horizon) * 6, 0, 1) * (0.8 + 0.2 * noise(q[:, 0], q[:, 1] * 2))


PATTERNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": _plain,
    "speckle": _speckle,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "tiles": _tiles,
    "bricks": _bricks,
    "planks": _planks,
    "wood": _wood,
    "marble": _marble,
    "view": _view,
    "painting": _marble,
}
"""Pattern name → function from pattern coordinates (N, 3) to the weight (N,) in [0, 1] of the second colour."""

CODES = {name: code for code, name in enumerate(PATTERNS)}


def albedo(codes: np.ndarray, q: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pattern codes (N,), pattern coordinates (N, 3), both colours (N, 3) → albedo (N, 3) float32."""
    weight = np.zeros(len(q), np.float32)
    for code in np.flatnonzero(np.bincount(codes, minlength=len(CODES))[1:]) + 1:
        chosen = np.flatnonzero(codes == code)
        weight[chosen] = list(PATTERNS.values())[code](q[chosen])
    result = first + weight[:, None] * (second - first)
    painted = np.flatnonzero(codes == CODES["painting"])
    if len(painted):
        wave = 2 * np.pi * (weight[painted, None] * 1.5 + 3 * first[painted])
        result[painted] = 0.4 + 0.35 * np.cos(wave)
    return result
