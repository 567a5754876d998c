"""One scene to one image and its labels."""

from __future__ import annotations

import numpy as np

from pamm.data.scenes.camera import Camera, choose
from pamm.data.scenes.geometry import Geometry
from pamm.data.scenes.rooms import Light, Room, furnish
from pamm.data.scenes.surfaces import Generator, albedo

SAMPLES = 2
"""The image averages SAMPLES² rays per pixel; labels come from the ray through the pixel's centre."""

BLOCK = 4096
"""Pixels shaded at a time: their arrays stay in the processor's cache."""


def scene(rng: Generator, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """A random scene of the given (H, W).

    → image (3, H, W) uint8; semseg, human_parts, sal, edge (1, H, W) uint8; depth (1, H, W) float32, metres along the
    camera's axis; normals (3, H, W) float32, unit vectors with x right, y up, z towards the viewer.
    """
    room = furnish(rng)
    geometry = Geometry(room)
    camera = choose(rng, room, geometry, size)
    rays = camera.rays(size)
    hits = geometry.cast(camera.place, rays)
    normals = geometry.normals(hits, rays)
    start = camera.place + rays * hits.distance[:, None] + 2e-3 * normals
    seen = _visibility(rng, room, geometry, start.astype(np.float32), normals.astype(np.float32))
    part = geometry.part[hits.triangle].reshape(size)
    image = photograph(rng, room, geometry, camera, size, _blurred(seen.reshape(-1, *size), part))
    return {
        "image": image,
        "semseg": geometry.label[part][None],
        "human_parts": geometry.human[part][None],
        "sal": geometry.salient[part][None],
        "edge": boundaries(geometry.thing[part])[None],
        "depth": hits.distance.reshape(1, *size).astype(np.float32),
        "normals": np.ascontiguousarray(np.einsum("nx,yx->yn", normals, camera.axes).reshape(3, *size), np.float32),
    }


def boundaries(things: np.ndarray) -> np.ndarray:
    """(H, W) object numbers → uint8 {0, 1}: lines one pixel wide inside the higher-numbered of two touching objects."""
    from skimage.morphology import thin

    marked = np.zeros(things.shape, bool)
    marked[1:] |= things[1:] > things[:-1]
    marked[:-1] |= things[:-1] > things[1:]
    marked[:, 1:] |= things[:, 1:] > things[:, :-1]
    marked[:, :-1] |= things[:, :-1] > things[:, 1:]
    return thin(marked).astype(np.uint8)


def photograph(
    rng: Generator, room: Room, geometry: Geometry, camera: Camera, size: tuple[int, int], seen: np.ndarray
) -> np.ndarray:
    """The image (3, H, W) uint8: shaded, exposed, vignetted, with a camera's noise.

    `seen` (lights + 1, H, W): the share of every light, and of the light from everywhere, that reaches a pixel.
    """
    rays = camera.rays(size, SAMPLES).astype(np.float32)
    seen = seen.reshape(len(seen), -1)
    pixels = seen.shape[1]
    radiance = np.empty((pixels, 3), np.float32)
    for first in range(0, pixels, BLOCK):
        block = slice(first, first + BLOCK)
        samples = rays[first * SAMPLES**2 : (first + BLOCK) * SAMPLES**2]
        shares = np.repeat(seen[:, block], SAMPLES**2, axis=1)
        radiance[block] = _radiance(room, geometry, camera, samples, shares).reshape(-1, SAMPLES**2, 3).mean(axis=1)
    return _develop(rng, radiance.reshape(*size, 3))


def _radiance(room: Room, geometry: Geometry, camera: Camera, rays: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Light (N, 3) that comes to the camera along rays (N, 3), with the `shares` (lights + 1, N) that reach the scene."""
    hits = geometry.cast(camera.place, rays, exact=False)
    part = geometry.part[hits.triangle]
    normal = geometry.normals(hits, rays).astype(np.float32)
    point = (camera.place + rays * hits.distance[:, None]).astype(np.float32)
    frame = geometry.frame[part]
    pattern = np.einsum("nij,nj->ni", frame[:, :, :3], point) + frame[:, :, 3]
    base = albedo(geometry.code[part], pattern, geometry.first[part], geometry.second[part])
    gloss = geometry.gloss[part]
    glossy = np.flatnonzero(gloss)
    view = -rays[glossy]
    view /= np.sqrt(np.einsum("nx,nx->n", view, view))[:, None]
    light = (shares[-1] * (0.8 + 0.2 * normal[:, 2]))[:, None] * room.ambient.astype(np.float32)
    light += geometry.emit[part][:, None]
    highlight = np.zeros((len(glossy), 3), np.float32)
    for lamp, share in zip(room.lights, shares, strict=False):
        towards, strength = _incident(lamp, point)
        power = lamp.power.astype(np.float32)
        strength *= share
        light += (strength * np.maximum(np.einsum("nx,nx->n", towards, normal), 0))[:, None] * power
        half = towards[glossy] + view
        aligned = np.einsum("nx,nx->n", half, normal[glossy]) / np.sqrt(np.einsum("nx,nx->n", half, half) + 1e-6)
        highlight += (np.maximum(aligned, 0) ** 32 * strength[glossy])[:, None] * power
    radiance = base * light
    radiance[glossy] += gloss[glossy, None] * highlight
    return radiance


def _incident(lamp: Light, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions (N, 3) from points to a light's centre, and its strength (N,) there if nothing is in between."""
    towards = lamp.centre.astype(np.float32) - point
    square = np.einsum("nx,nx->n", towards, towards)
    towards /= np.sqrt(square)[:, None]
    strength = 1 / (square + 0.25)
    if lamp.facing.any():
        strength *= np.maximum(np.einsum("nx,x->n", towards, -lamp.facing.astype(np.float32)), 0)
    return towards, strength


def _visibility(rng: Generator, room: Room, geometry: Geometry, start: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """(lights + 1, N): whether a random point of each light is seen from `start`, and how open a random direction is."""
    count = len(start)
    seen = np.empty((len(room.lights) + 1, count), np.float32)
    for row, lamp in zip(seen, room.lights, strict=False):
        jitter = rng.random((count, 3), np.float32) * 2 - 1
        towards = (lamp.centre + lamp.extent * jitter).astype(np.float32) - start
        distance = np.sqrt(np.einsum("nx,nx->n", towards, towards))
        reach = np.maximum(distance - lamp.margin - 0.01, 0) / distance
        row[:] = ~geometry.blocked(start, towards, reach)
    direction = rng.standard_normal((count, 3), np.float32)
    direction /= np.sqrt(np.einsum("nx,nx->n", direction, direction))[:, None]
    direction += 1.02 * normal
    seen[-1] = 1 - 0.6 * geometry.blocked(start, direction, np.full(count, 0.6))
    return seen


def _blurred(maps: np.ndarray, part: np.ndarray, radius: int = 1) -> np.ndarray:
    """Maps (M, H, W) averaged over the neighbours of each pixel that show the same part (H, W)."""
    height, width = part.shape
    framed = np.pad(maps, ((0, 0), (radius, radius), (radius, radius)))
    parts = np.pad(part, radius, constant_values=-1)
    total, count = np.zeros_like(maps), np.zeros(part.shape, np.float32)
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            same = parts[dy : dy + height, dx : dx + width] == part
            total += framed[:, dy : dy + height, dx : dx + width] * same
            count += same
    return total / count


def _develop(rng: Generator, radiance: np.ndarray) -> np.ndarray:
    """Radiance (H, W, 3) → image (3, H, W) uint8: exposure, vignette, tone curve, noise."""
    height, width, _ = radiance.shape
    exposure = rng.uniform(0.22, 0.5) / (np.median(radiance) + 0.2 * radiance.mean() + 1e-6)
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    fade = 1 - rng.uniform(0, 0.2) * (x * x + y * y)
    exposed = radiance * (exposure * fade)[:, :, None]
    tone = np.clip(exposed * (1 + 0.15 * exposed) / (1 + exposed * 0.75), 0, 1) ** (1 / 2.2)
    tone = tone + rng.standard_normal(tone.shape, np.float32) * rng.uniform(0.004, 0.02)
    return np.ascontiguousarray((np.clip(tone, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(2, 0, 1))
