"""Furniture assembled from solids. Every piece stands on its own origin with its back at -y and its front towards +y."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from pamm.data.scenes.solids import Part, Thing, box, cylinder, ellipsoid, turn
from pamm.data.scenes.surfaces import Generator, Surface, color, fabric, plain, surface, wood


def _legs(rng: Generator, width: float, depth: float, height: float, material: Surface) -> list[Part]:
    """Four legs under a top of the given extent, square or round."""
    thick = rng.uniform(0.035, 0.08)
    x, y = width / 2 - thick, depth / 2 - thick
    corners = [(-x, -y), (x, -y), (-x, y), (x, y)]
    if rng.random() < 0.5:
        return [box((thick, thick, height), (a, b, height / 2), material) for a, b in corners]
    return [cylinder(thick / 2, height, (a, b, 0), material, taper=1.0) for a, b in corners]


def table(rng: Generator, *, height: float | None = None, extent: tuple[float, float] | None = None) -> Thing:
    """A table on four legs or one foot, with a rectangular or round top."""
    height = rng.uniform(0.68, 0.8) if height is None else height
    width, depth = extent or (rng.uniform(0.8, 1.8), rng.uniform(0.6, 1.0))
    top, leg = wood(rng), wood(rng)
    thick = rng.uniform(0.025, 0.06)
    if rng.random() < 0.3:
        width = depth = min(width, 1.2)
        parts = [cylinder(width / 2, thick, (0, 0, height - thick), top)]
        parts += [
            cylinder(0.05, height - thick, (0, 0, 0), leg),
            cylinder(width * 0.28, 0.04, (0, 0, 0), leg, taper=0.8),
        ]
        free = width * 0.65
    else:
        parts = [box((width, depth, thick), (0, 0, height - thick / 2), top)]
        parts += _legs(rng, width, depth, height - thick, leg)
        free = 1.0
        if rng.random() < 0.4:
            parts.append(box((width * 0.9, depth * 0.86, 0.08), (0, 0, height - thick - 0.04), leg))
    extent = (free, free) if free < 1 else (width * 0.9, depth * 0.9)
    return Thing("table", parts, (width, depth), tops=[(0, 0, height, *extent)])


def low_table(rng: Generator) -> Thing:
    """A coffee table."""
    return table(rng, height=rng.uniform(0.35, 0.5), extent=(rng.uniform(0.7, 1.2), rng.uniform(0.5, 0.7)))


def chair(rng: Generator, look: tuple[Surface, Surface] | None = None) -> Thing:
    """A chair with a solid, slatted or padded back; `look`: surfaces of the frame and the seat, for chairs of one set."""
    frame, seat = look or (wood(rng), fabric(rng) if rng.random() < 0.5 else wood(rng))
    width, height = rng.uniform(0.4, 0.48), rng.uniform(0.43, 0.48)
    parts = [box((width, width, 0.05), (0, 0, height - 0.025), seat), *_legs(rng, width, width, height - 0.05, frame)]
    tall, y = rng.uniform(0.38, 0.55), -width / 2 + 0.02
    style = rng.integers(3)
    if style == 0:
        parts.append(box((width, 0.035, tall * 0.8), (0, y, height + 0.12 + tall * 0.4), seat))
    elif style == 1:
        for step in range(3):
            parts.append(box((width, 0.025, 0.06), (0, y, height + tall * (0.35 + 0.3 * step)), frame))
    else:
        for x in np.linspace(-0.3, 0.3, 4) * width:
            parts.append(box((0.025, 0.025, tall), (x, y, height + tall / 2), frame))
        parts.append(box((width, 0.03, 0.08), (0, y, height + tall), frame))
    if style < 2:
        parts += [
            box((0.035, 0.035, tall), (x, y - 0.01, height + tall / 2), frame) for x in (-0.45 * width, 0.45 * width)
        ]
    return Thing("chair", parts, (width, width), seats=[(0, 0.02, height)])


def armchair(rng: Generator) -> Thing:
    """A swivel chair or an upholstered one."""
    if rng.random() < 0.5:
        return sofa(rng, width=rng.uniform(0.75, 0.95), label="chair")
    cloth, metal = fabric(rng), plain(rng, np.full(3, rng.uniform(0.05, 0.4)), gloss=0.5)
    parts = [box((0.5, 0.48, 0.08), (0, 0, 0.46), cloth), cylinder(0.03, 0.34, (0, 0, 0.08), metal)]
    parts += [box((0.46, 0.06, 0.5), (0, -0.23, 0.8), cloth), box((0.06, 0.04, 0.3), (0, -0.25, 0.5), metal)]
    for angle in np.arange(5) * 2 * np.pi / 5:
        arm = turn(angle)
        parts.append(box((0.28, 0.045, 0.04), arm @ [0.14, 0, 0.07], metal, rotation=arm))
        parts.append(ellipsoid((0.03, 0.03, 0.03), arm @ [0.28, 0, 0.03], metal))
    return Thing("chair", parts, (0.6, 0.6), seats=[(0, 0.04, 0.5)])


def sofa(rng: Generator, *, width: float | None = None, label: str = "sofa") -> Thing:
    """A sofa with arms, seat and back cushions and perhaps loose pillows."""
    width = rng.uniform(1.4, 2.3) if width is None else width
    depth, height, arm = rng.uniform(0.8, 0.95), rng.uniform(0.38, 0.46), rng.uniform(0.12, 0.2)
    cloth = fabric(rng)
    cushion = cloth if rng.random() < 0.7 else fabric(rng)
    back = rng.uniform(0.75, 0.95)
    parts = [box((width, depth, height - 0.22), (0, 0, 0.05 + (height - 0.22) / 2), cloth)]
    parts.append(box((width, 0.2, back - 0.05), (0, -depth / 2 + 0.1, 0.05 + (back - 0.05) / 2), cloth))
    tall = height + rng.uniform(0.12, 0.22)
    for side in (-1, 1):
        x = side * (width - arm) / 2
        parts.append(box((arm, depth, tall - 0.05), (x, 0, 0.05 + (tall - 0.05) / 2), cloth))
    count = max(1, round((width - 2 * arm) / 0.65))
    each = (width - 2 * arm) / count
    seats = []
    for k in range(count):
        x = -width / 2 + arm + (k + 0.5) * each
        parts.append(box((each - 0.015, depth - 0.22, 0.16), (x, 0.11, height - 0.08), cushion))
        lean = turn(0, 0.15)
        parts.append(box((each - 0.03, 0.16, 0.42), (x, -depth / 2 + 0.28, height + 0.2), cushion, rotation=lean))
        seats.append((x, 0.12, height))
    if label == "sofa" and rng.random() < 0.6:
        tilt = turn(rng.uniform(-0.5, 0.5), -0.4, rng.uniform(-0.4, 0.4))
        place = (rng.choice([-1, 1]) * (width / 2 - arm - 0.2), 0.02, height + 0.2)
        parts.append(ellipsoid((0.22, 0.09, 0.2), place, fabric(rng), rotation=tilt))
    return Thing(label, parts, (width, depth), seats=seats)


def bed(rng: Generator) -> Thing:
    """A bed with a headboard at its back, mattress, blanket and pillows."""
    width, length = rng.choice([0.95, 1.4, 1.7]), rng.uniform(1.95, 2.1)
    height = rng.uniform(0.42, 0.6)
    frame, cloth = wood(rng), fabric(rng)
    sheet = plain(rng, np.full(3, rng.uniform(0.55, 0.9)), gloss=0)
    parts = [box((width, length, height - 0.28), (0, 0, 0.08 + (height - 0.28) / 2), frame)]
    parts.append(box((width - 0.04, length - 0.06, 0.2), (0, 0.01, height - 0.1), sheet))
    cover = length * rng.uniform(0.55, 0.75)
    parts.append(box((width + 0.02, cover, 0.22), (0, length / 2 - cover / 2 + 0.01, height - 0.07), cloth))
    board = rng.uniform(0.75, 1.2)
    parts.append(box((width + 0.06, 0.06, board), (0, -length / 2 - 0.02, board / 2), frame))
    pillow = sheet if rng.random() < 0.5 else fabric(rng)
    count = 1 if width < 1.2 else 2
    for k in range(count):
        x = (k - (count - 1) / 2) * width * 0.48
        parts.append(ellipsoid((0.3, 0.2, 0.1), (x, -length / 2 + 0.28, height + 0.07), pillow, rotation=turn(0, 0.25)))
    for x in (-width / 2 + 0.05, width / 2 - 0.05):
        parts += [box((0.07, 0.07, 0.1), (x, y, 0.05), frame) for y in (-length / 2 + 0.06, length / 2 - 0.06)]
    seats = [(0.0, length / 2 - 0.25, height + 0.04)]
    tops = [(0, length * 0.2, height + 0.04, width * 0.7, length * 0.4)]
    return Thing("bed", parts, (width + 0.06, length + 0.1), seats=seats, tops=tops)


def cabinet(rng: Generator) -> Thing:
    """A wardrobe, a sideboard or a chest: doors or drawers with handles."""
    tall = rng.random() < 0.4
    width = rng.uniform(0.7, 1.5)
    height = rng.uniform(1.6, 2.1) if tall else rng.uniform(0.6, 1.1)
    depth = rng.uniform(0.38, 0.6)
    body = wood(rng, "zyx")
    front = body if rng.random() < 0.5 else wood(rng, "zxy")
    knob = plain(rng, np.full(3, rng.uniform(0.1, 0.8)), gloss=0.6)
    parts = [box((width, depth, height - 0.06), (0, 0, 0.06 + (height - 0.06) / 2), body)]
    parts.append(box((width - 0.06, depth - 0.06, 0.06), (0, -0.01, 0.03), front))
    columns = int(rng.integers(2, 4))
    rows = 1 if tall and rng.random() < 0.7 else int(rng.integers(1, 5))
    wide, high = width / columns, (height - 0.1) / rows
    for i in range(columns):
        for j in range(rows):
            x, z = -width / 2 + (i + 0.5) * wide, 0.08 + (j + 0.5) * high
            parts.append(box((wide - 0.025, 0.02, high - 0.025), (x, depth / 2 + 0.01, z), front))
            if rows > 1:
                parts.append(box((min(0.12, wide * 0.5), 0.02, 0.02), (x, depth / 2 + 0.03, z), knob))
            else:
                side = x + (wide / 2 - 0.05) * (1 if i % 2 == 0 else -1)
                parts.append(box((0.02, 0.02, 0.12), (side, depth / 2 + 0.03, z), knob))
    tops = [] if tall else [(0, 0, height, width * 0.9, depth * 0.8)]
    return Thing("cabinet", parts, (width, depth + 0.05), tops=tops)


def shelf(rng: Generator) -> Thing:
    """An open bookcase filled with books, which belong to it."""
    width, height, depth = rng.uniform(0.6, 1.2), rng.uniform(1.0, 2.1), rng.uniform(0.25, 0.36)
    body, thick = wood(rng), 0.025
    parts = [box((thick, depth, height), (side * (width - thick) / 2, 0, height / 2), body) for side in (-1, 1)]
    parts.append(box((width - 2 * thick, 0.012, height), (0, -depth / 2 + 0.006, height / 2), body))
    count = max(3, round(height / 0.36))
    levels = np.linspace(0.06, height - thick, count + 1)
    parts += [box((width - 2 * thick, depth - 0.002, thick), (0, 0, z), body) for z in levels]
    covers = [plain(rng) for _ in range(6)]
    for z, ceiling in pairwise(levels):
        x, end = -width / 2 + thick + 0.01, width / 2 - thick - rng.uniform(0.05, 0.6) * width
        while x < end:
            wide, high = rng.uniform(0.03, 0.075), (ceiling - z - thick) * rng.uniform(0.6, 0.92)
            book = (wide * 0.96, depth * 0.7, high)
            parts.append(box(book, (x + wide / 2, -0.02, z + thick / 2 + high / 2), covers[rng.integers(6)]))
            x += wide
    return Thing(
        "cabinet", parts, (width, depth), tops=[(0, 0, height, width * 0.8, depth * 0.7)] if height < 1.3 else []
    )


def lamp(rng: Generator, height: float | None = None) -> Thing:
    """A standing lamp with a glowing shade; small ones stand on furniture."""
    height = rng.uniform(1.3, 1.75) if height is None else height
    metal = plain(rng, gloss=0.6)
    radius = rng.uniform(0.14, 0.24) * (1 if height > 1 else 0.7)
    tall = radius * rng.uniform(0.9, 1.5)
    glow = plain(
        rng, np.array([1.0, 0.8, 0.55]) * rng.uniform(0.6, 0.9) + 0.1 * color(rng), gloss=0, emit=rng.uniform(0.4, 2.0)
    )
    parts = [cylinder(radius * 0.7, 0.03, (0, 0, 0), metal, taper=0.9)]
    if height < 1 and rng.random() < 0.6:
        parts.append(
            ellipsoid((radius * 0.55, radius * 0.55, (height - tall) / 2), (0, 0, (height - tall) / 2 + 0.02), metal)
        )
    parts.append(cylinder(0.013, height - 0.1, (0, 0, 0.02), metal))
    if rng.random() < 0.25:
        parts.append(ellipsoid((radius * 0.8,) * 3, (0, 0, height - radius * 0.8), glow))
    else:
        parts.append(cylinder(radius, tall, (0, 0, height - tall), glow, taper=rng.uniform(0.5, 1.0)))
    return Thing("lamp", parts, (2 * radius, 2 * radius))


def ceiling_lamp(rng: Generator) -> Thing:
    """A lamp whose origin is the ceiling: a panel, a dome, or a shade hanging from a cord."""
    glow = plain(rng, np.array([1.0, 0.93, 0.82]), gloss=0, emit=rng.uniform(2, 5))
    dark = plain(rng)
    style = rng.integers(3)
    if style == 0:
        size = (rng.uniform(0.3, 0.6), rng.uniform(0.3, 1.2), 0.04)
        return Thing("lamp", [box(size, (0, 0, -0.022), glow)])
    if style == 1:
        return Thing(
            "lamp", [ellipsoid((0.2, 0.2, 0.1), (0, 0, -0.01), glow), cylinder(0.22, 0.02, (0, 0, -0.02), dark)]
        )
    drop, radius = rng.uniform(0.35, 0.7), rng.uniform(0.12, 0.25)
    parts = [cylinder(0.008, drop, (0, 0, -drop), dark), ellipsoid((0.06, 0.06, 0.06), (0, 0, -drop - 0.08), glow)]
    parts.append(cylinder(radius, 0.16, (0, 0, -drop - 0.12), dark, taper=0.3))
    return Thing("lamp", parts)


def rug(rng: Generator) -> Thing:
    """A rectangular or round rug with a border."""
    patterns = ["plain", "speckle", "stripes", "checks", "dots", "marble", "tiles"]
    field, border = (surface(rng, patterns, period=(0.1, 0.5), gloss=0) for _ in range(2))
    if rng.random() < 0.25:
        radius = rng.uniform(0.6, 1.2)
        parts = [cylinder(radius, 0.012, (0, 0, 0.001), border), cylinder(radius * 0.85, 0.016, (0, 0, 0.001), field)]
        return Thing("rug", parts, (2 * radius, 2 * radius))
    width, depth = rng.uniform(1.2, 2.6), rng.uniform(0.9, 1.8)
    parts = [
        box((width, depth, 0.012), (0, 0, 0.007), border),
        box((width * 0.9, depth * 0.86, 0.016), (0, 0, 0.009), field),
    ]
    return Thing("rug", parts, (width, depth))


AGAINST_WALL: dict[str, tuple[float, Callable[[Generator], Thing]]] = {
    "cabinet": (1.0, cabinet),
    "shelf": (0.8, shelf),
    "sofa": (1.0, sofa),
    "bed": (0.9, bed),
    "table": (0.5, table),
    "lamp": (0.6, lamp),
    "armchair": (0.5, armchair),
}
"""Furniture that stands with its back to a wall: relative frequency and builder."""
