"""A room as one triangle mesh for Embree, with the look-up tables that lead from a triangle to what it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pamm.data.scenes.rooms import CLASSES, Room
from pamm.data.scenes.surfaces import CODES


@dataclass(frozen=True)
class Hits:
    """First hits of N rays: triangle index, barycentric weights of its second and third corner, distance along the ray."""

    triangle: np.ndarray
    weights: np.ndarray
    distance: np.ndarray


class Geometry:
    """Triangles of a room and, per part, its object, class, human part and surface.

    part: triangle → part. Per part: label (class), human, salient, thing (number of its object, walls being one; later
    objects are the more specific ones), code (pattern), first, second (colours), gloss, emit, and `frame` (P, 3, 4),
    from world to pattern coordinates.
    """

    def __init__(self, room: Room):
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene

        parts = [(thing, part) for thing in room.things for part in thing.parts]
        counts = [len(part.vertices) for _, part in parts]
        offsets = np.cumsum([0, *counts[:-1]])
        triangles = [len(part.faces) for _, part in parts]
        self.part = np.repeat(np.arange(len(parts)), triangles)
        faces = np.concatenate([part.faces + offset for (_, part), offset in zip(parts, offsets, strict=True)])
        yaw = np.array([thing.yaw for thing, _ in parts])
        place = np.array([thing.position for thing, _ in parts])
        vertices = _turned(np.concatenate([part.vertices for _, part in parts]), np.repeat(yaw, counts))
        vertices += np.repeat(place, counts, axis=0)
        corners = vertices[faces]
        self.flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        self.flat /= np.sqrt(np.einsum("fx,fx->f", self.flat, self.flat))[:, None]
        self.height = np.einsum("fx,fx->f", self.flat, corners[:, 0])
        smooth = np.concatenate([part.normals for _, part in parts])
        self.smooth = _turned(smooth, np.repeat(yaw, triangles)[:, None])
        self.curved = np.abs(np.einsum("fcx,fx->fc", self.smooth, self.flat)).min(axis=1) < 1 - 1e-9
        self._tables(parts)
        self.embree: Any = EmbreeScene(robust=True)
        TriangleMesh(self.embree, vertices.astype(np.float32), faces.astype(np.int32))

    def _tables(self, parts: list[Any]) -> None:
        surfaces = [part.surface for _, part in parts]
        order = {"wall": 0, "floor": 1, "ceiling": 2}
        numbers: dict[int, int] = {}
        for thing, _ in parts:
            numbers.setdefault(id(thing), order[thing.label] if thing.shell else len(order) + len(numbers))
        self.thing = np.array([numbers[id(thing)] for thing, _ in parts], np.int32)
        self.label = np.array([CLASSES.index(thing.label) for thing, _ in parts], np.uint8)
        self.human = np.array([part.human for _, part in parts], np.uint8)
        self.salient = np.array([thing.salient for thing, _ in parts], np.uint8)
        self.code = np.array([CODES[surface.pattern] for surface in surfaces])
        self.first = np.array([surface.first for surface in surfaces], np.float32)
        self.second = np.array([surface.second for surface in surfaces], np.float32)
        self.gloss = np.array([surface.gloss for surface in surfaces], np.float32)
        self.emit = np.array([surface.emit for surface in surfaces], np.float32)
        turns = {id(thing): thing.rotation() for thing, _ in parts}
        linear = np.stack([part.surface.basis for _, part in parts])
        linear = linear @ np.stack([turns[id(thing)] for thing, _ in parts]).transpose(0, 2, 1)
        shift = np.stack([part.surface.offset for _, part in parts])
        shift = shift - np.einsum("pij,pj->pi", linear, np.array([thing.position for thing, _ in parts]))
        self.frame = np.concatenate([linear, shift[:, :, None]], axis=2).astype(np.float32)

    def cast(self, origin: np.ndarray, directions: np.ndarray, exact: bool = True) -> Hits:
        """First hits of rays (N, 3) from one point.

        exact: compute the distance in float64 on the triangle's plane; else it is Embree's, to float32 rounding.
        """
        rays = directions.astype(np.float32)
        starts = np.empty_like(rays)
        starts[:] = origin
        found = self.embree.run(starts, rays, output=True)
        triangle, weights = found["primID"], np.stack([found["u"], found["v"]], -1)
        if not exact:
            return Hits(triangle, weights, found["tfar"])
        slope = np.einsum("nx,nx->n", directions, self.flat[triangle])
        return Hits(
            triangle, np.stack([found["u"], found["v"]], -1), (self.height - self.flat @ origin)[triangle] / slope
        )

    def blocked(self, starts: np.ndarray, directions: np.ndarray, reach: np.ndarray) -> np.ndarray:
        """(N,) bool: whether something lies on the ray before `reach` (N,) times its direction."""
        return self.embree.run(starts, directions, reach.astype(np.float32), query="OCCLUDED") >= 0

    def normals(self, hits: Hits, directions: np.ndarray) -> np.ndarray:
        """Unit normals (N, 3) of the smooth surface at the hits, on the side of the viewer."""
        normal = self.flat[hits.triangle]
        normal *= -np.sign(np.einsum("nx,nx->n", normal, directions))[:, None]
        curved = np.flatnonzero(self.curved[hits.triangle])
        corners = self.smooth[hits.triangle[curved]]
        second, third = hits.weights[curved, :1], hits.weights[curved, 1:]
        smooth = corners[:, 0] * (1 - second - third) + corners[:, 1] * second + corners[:, 2] * third
        smooth /= np.sqrt(np.einsum("nx,nx->n", smooth, smooth))[:, None]
        towards = np.einsum("nx,nx->n", smooth, directions[curved]) < -1e-3
        normal[curved[towards]] = smooth[towards]
        return normal


def _turned(vectors: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """Vectors (..., 3) turned about the vertical, each by its own angle."""
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    cosine, sine = np.cos(yaw), np.sin(yaw)
    return np.stack([cosine * x - sine * y, sine * x + cosine * y, z], -1)
