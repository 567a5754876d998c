"""Small things, things on walls, and the one salient object of a scene."""

from __future__ import annotations

import numpy as np

from pamm.data.scenes.solids import Part, Thing, box, capsule, cone, cylinder, ellipsoid, prism, torus, tube, turn
from pamm.data.scenes.surfaces import Generator, Surface, color, plain, surface, wood


def picture(rng: Generator, width: float, height: float) -> Thing:
    """A framed painting; its back is the wall at y = 0, its centre the origin."""
    frame = rng.uniform(0.02, 0.06)
    canvas = surface(rng, ["painting"], axes="xzy", period=(0.25, 1.2), first=rng.random(3), gloss=0.0)
    parts = [box((width, 0.03, height), (0, 0.016, 0), wood(rng))]
    if rng.random() < 0.5:
        mat = plain(rng, np.full(3, 0.8), gloss=0)
        parts.append(box((width - 2 * frame, 0.004, height - 2 * frame), (0, 0.034, 0), mat))
        frame += 0.06
    parts.append(box((width - 2 * frame, 0.008, height - 2 * frame), (0, 0.036, 0), canvas))
    return Thing("picture", parts)


def window(rng: Generator, width: float, height: float) -> Thing:
    """A window with a frame, bars and the bright outdoors, sometimes with curtains; its back is the wall at y = 0."""
    frame = plain(rng, np.full(3, 0.75) if rng.random() < 0.6 else None)
    land, sky = color(rng, 0.4) * [0.4, 0.7, 0.3], np.array([0.55, 0.75, 1.0]) * rng.uniform(0.5, 1.0)
    glass = Surface(
        "view",
        land,
        sky,
        np.eye(3)[[0, 2, 1]] / [[1.0], [height], [1.0]],
        np.array([rng.uniform(0, 9), 0.5, 0]),
        0.2,
        2.5,
    )
    parts = [box((width, 0.012, height), (0, 0.007, 0), glass)]
    bars_x = [-width / 2, *(np.linspace(-0.5, 0.5, int(rng.integers(2, 4)))[1:-1] * width), width / 2]
    bars_z = [-height / 2, *(np.linspace(-0.5, 0.5, int(rng.integers(2, 4)))[1:-1] * height), height / 2]
    parts += [box((0.06, 0.05, height + 0.06), (x, 0.026, 0), frame) for x in bars_x]
    parts += [box((width + 0.06, 0.046, 0.06), (0, 0.024, z), frame) for z in bars_z]
    parts.append(box((width + 0.14, 0.12, 0.03), (0, 0.06, -height / 2 - 0.045), frame))
    if rng.random() < 0.4:
        cloth = surface(rng, ["plain", "stripes", "dots", "speckle"], period=(0.06, 0.2), gloss=0)
        fall = height + 0.3
        for side in (-1, 1):
            for fold in range(4):
                x = side * (width / 2 + 0.12 - 0.07 * fold)
                parts.append(capsule((x, 0.1, -fall / 2), (x, 0.1, fall / 2), 0.04, cloth))
    return Thing("window", parts)


def door(rng: Generator, width: float, height: float) -> Thing:
    """A closed door with panels, a frame and a handle; its back is the wall at y = 0, its origin the floor."""
    leaf, frame = wood(rng, "zxy"), wood(rng, "zxy")
    knob = plain(rng, np.full(3, rng.uniform(0.2, 0.8)), gloss=0.6)
    parts = [box((width, 0.03, height), (0, 0.016, height / 2), leaf)]
    parts += [
        box((0.09, 0.06, height + 0.09), (s * (width + 0.09) / 2, 0.031, (height + 0.09) / 2), frame) for s in (-1, 1)
    ]
    parts.append(box((width, 0.058, 0.09), (0, 0.03, height + 0.045), frame))
    for row in range(int(rng.integers(0, 4))):
        z = height * (0.22 + 0.28 * row)
        parts += [box((width * 0.34, 0.02, height * 0.2), (s * width * 0.22, 0.028, z), leaf) for s in (-1, 1)]
    side = rng.choice([-1, 1]) * (width / 2 - 0.08)
    parts += [
        box((0.03, 0.06, 0.03), (side, 0.06, 1.0), knob),
        box((0.12, 0.02, 0.025), (side * 0.9, 0.095, 1.0), knob),
    ]
    return Thing("door", parts)


def plant(rng: Generator, size: float) -> Thing:
    """A pot with leaves, `size` metres high."""
    pot = plain(rng)
    leaf = plain(rng, np.array([0.12, 0.35, 0.08]) * rng.uniform(0.5, 1.7), gloss=0.2)
    radius, tall = size * rng.uniform(0.14, 0.22), size * 0.3
    parts = [cylinder(radius * 0.75, tall, (0, 0, 0), pot, taper=1.3)]
    for _ in range(int(rng.integers(7, 13))):
        turned = turn(rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.9))
        length = size * rng.uniform(0.25, 0.36)
        middle = np.array([0, 0, tall]) + turned @ [0, 0, length]
        parts.append(ellipsoid((length * 0.28, length * 0.07, length), middle, leaf, rotation=turned))
    return Thing("object", parts, (3 * radius, 3 * radius))


def trinket(rng: Generator) -> Thing:
    """A common small thing: box, ball, vase, pile of books, bottle, bowl or plant."""
    look = surface(rng, ["plain", "plain", "stripes", "checks", "dots", "speckle"], period=(0.04, 0.15))
    size = rng.uniform(0.1, 0.3)
    style = rng.integers(6)
    if style == 0:
        extent = size * rng.uniform(0.6, 1.3, 3)
        parts = [box(extent, (0, 0, extent[2] / 2), look)]
    elif style == 1:
        parts = [ellipsoid((size / 2,) * 3, (0, 0, size / 2), look)]
    elif style == 2:
        parts = [cylinder(size * 0.25, size * 0.8, (0, 0, 0), look, taper=1.4)]
        parts.append(cylinder(size * 0.35, size * 0.5, (0, 0, size * 0.8), look, taper=0.4))
    elif style == 3:
        parts = []
        for k in range(int(rng.integers(2, 6))):
            parts.append(
                box((0.24, 0.17, 0.038), (0, 0, 0.02 + 0.04 * k), plain(rng), rotation=turn(rng.uniform(-0.4, 0.4)))
            )
    elif style == 4:
        parts = [
            cylinder(size * 0.2, size * 0.9, (0, 0, 0), look),
            cylinder(size * 0.2, size * 0.3, (0, 0, size * 0.9), look, taper=0.3),
        ]
        parts.append(cylinder(size * 0.06, size * 0.2, (0, 0, size * 1.2), look))
    else:
        return plant(rng, rng.uniform(0.25, 0.5))
    return Thing("object", parts, (size, size))


def _knot(rng: Generator, size: float, look: list[Surface]) -> list[Part]:
    p, q = [(2, 3), (3, 2), (2, 5), (3, 4)][rng.integers(4)]
    t = np.linspace(0, 2 * np.pi, 56, endpoint=False)
    r = 2 + np.cos(q * t)
    path = np.stack([r * np.cos(p * t), -np.sin(q * t), r * np.sin(p * t)], -1) * size / 6.6
    return [tube(path @ turn(rng.uniform(0, 6), rng.uniform(-0.5, 0.5)).T, size * rng.uniform(0.05, 0.08), look[0])]


def _rings(rng: Generator, size: float, look: list[Surface]) -> list[Part]:
    count = int(rng.integers(1, 4))
    turns = [turn(rng.uniform(0, 6), np.pi / 2 + rng.uniform(-0.4, 0.4), k * 1.1) for k in range(count)]
    return [
        torus(size * 0.38, 0.25 if count == 1 else 0.15, (0, 0, 0), look[k % 2], rotation=turned)
        for k, turned in enumerate(turns)
    ]


def _urchin(rng: Generator, size: float, look: list[Surface]) -> list[Part]:
    count = int(rng.integers(14, 26))
    height = 1 - 2 * (np.arange(count) + 0.5) / count
    angle = np.pi * (3 - 5**0.5) * np.arange(count)
    around = np.sqrt(1 - height**2)
    directions = np.stack([around * np.cos(angle), around * np.sin(angle), height], -1)
    body = size * rng.uniform(0.22, 0.3)
    spikes = [cone(d * body * 0.9, d * size / 2, size * 0.07, look[1]) for d in directions]
    return [ellipsoid((body,) * 3, (0, 0, 0), look[0]), *spikes]


def _star(rng: Generator, size: float, look: list[Surface]) -> list[Part]:
    points = int(rng.integers(4, 8))
    angle = np.arange(2 * points) * np.pi / points + np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, 0.5, rng.uniform(0.18, 0.28)) * size
    outline = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    yaw = rng.uniform(0, np.pi)
    parts = [prism(outline, size * 0.14, (0, 0, 0), look[0], rotation=turn(yaw))]
    if rng.random() < 0.6:
        parts.append(prism(outline * 0.98, size * 0.14, (0, 0, 0), look[1], rotation=turn(yaw + np.pi / 2)))
    return parts


def _helix(rng: Generator, size: float, look: list[Surface]) -> list[Part]:
    t = np.arange(17) / 16
    turns = rng.uniform(1.2, 2.2) * 2 * np.pi
    parts = []
    for strand in range(2):
        angle = t * turns + strand * np.pi
        path = np.stack([0.28 * np.cos(angle), 0.28 * np.sin(angle), 1.1 * (t - 0.5)], -1) * size
        parts += [capsule(a, b, size * 0.05, look[strand]) for a, b in zip(path[:-1:2], path[2::2], strict=True)]
    return parts


def _molecule(rng: Generator, size: float, look: list[Surface]) -> list[Part]:
    parts = [ellipsoid((size * 0.2,) * 3, (0, 0, 0), look[0])]
    for _ in range(int(rng.integers(4, 8))):
        direction = rng.normal(size=3)
        end = direction / np.linalg.norm(direction) * size * 0.38
        parts += [
            capsule((0, 0, 0), end, size * 0.035, look[1]),
            ellipsoid((size * rng.uniform(0.08, 0.14),) * 3, end, look[0]),
        ]
    return parts


def salient(rng: Generator) -> Thing:
    """The strange object of a scene: a knot, rings, an urchin, a star, a helix or a molecule in vivid colours."""
    size = rng.uniform(0.35, 0.65)
    patterns = ["plain", "plain", "stripes", "checks", "dots"]
    look = [surface(rng, patterns, period=(0.05, 0.12), first=color(rng, rng.uniform(0.75, 1.0))) for _ in range(2)]
    build = [_knot, _rings, _urchin, _star, _helix, _molecule][rng.integers(6)]
    parts = build(rng, size, look)
    lift = np.array([0, 0, 0.004 - min(part.vertices[:, 2].min() for part in parts)])
    parts = [Part(p.vertices + lift, p.faces, p.normals, p.surface) for p in parts]
    return Thing("object", parts, (size * 0.8, size * 0.8), salient=True)
