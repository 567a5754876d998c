"""Solids that scenes are assembled from: triangles with the normals of the smooth surface they approximate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from pamm.data.scenes.surfaces import Surface

Vector = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Part:
    """One solid of a thing: vertices (V, 3), faces (F, 3) and the unit normals (F, 3, 3) at every face's corners.

    `human` is the human part it belongs to (0: none).
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    surface: Surface
    human: int = 0


@dataclass
class Thing:
    """One object of a scene, built around its own origin on the ground with its front towards +y, then placed.

    footprint: width (x) and depth (y), metres. tops: free horizontal surfaces, (x, y, z, width, depth). seats: places to
    sit, (x, y, z). shell: part of the room itself (walls are one object of the image, whatever their number).
    """

    label: str
    parts: list[Part]
    footprint: tuple[float, float] = (0.0, 0.0)
    tops: list[tuple[float, ...]] = field(default_factory=list)
    seats: list[tuple[float, ...]] = field(default_factory=list)
    salient: bool = False
    shell: bool = False
    yaw: float = 0.0
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def placed(self, x: float, y: float, z: float = 0.0, yaw: float = 0.0) -> Thing:
        """Stand the thing at (x, y, z), turned by `yaw` radians about the vertical; returns it."""
        self.position, self.yaw = (x, y, z), yaw
        return self

    def rotation(self) -> np.ndarray:
        """(3, 3) matrix from the thing's own axes to the world's."""
        return turn(self.yaw)

    def world(self, point: Vector) -> np.ndarray:
        """A point of the thing's own coordinates in the world's."""
        return self.rotation() @ np.asarray(point[:3], float) + self.position


def turn(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """(3, 3) rotation: roll about y, then pitch about x, then yaw about z."""
    cosine, sine = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    about_z = np.array([[cosine[0], -sine[0], 0], [sine[0], cosine[0], 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cosine[1], -sine[1]], [0, sine[1], cosine[1]]])
    about_y = np.array([[cosine[2], 0, sine[2]], [0, 1, 0], [-sine[2], 0, cosine[2]]])
    return about_z @ about_x @ about_y


Shape = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Vertices (V, 3), faces (F, 3), corner normals (F, 3, 3)."""


def _flat(mesh: Any) -> Shape:
    return _arrays(mesh, np.repeat(mesh.face_normals[:, None], 3, axis=1))


def _smooth(mesh: Any) -> Shape:
    return _arrays(mesh, mesh.vertex_normals[mesh.faces])


def _arrays(mesh: Any, normals: np.ndarray) -> Shape:
    return np.array(mesh.vertices, float), np.array(mesh.faces, np.int32), np.array(normals, float)


@cache
def _cube() -> Shape:
    import trimesh

    return _flat(trimesh.creation.box(extents=(1, 1, 1)))


@cache
def _ball(subdivisions: int) -> Shape:
    import trimesh

    vertices, faces, _ = _smooth(trimesh.creation.icosphere(subdivisions=subdivisions, radius=1))
    return vertices, faces, vertices[faces]


@cache
def _ring(thickness: float) -> Shape:
    import trimesh

    return _smooth(trimesh.creation.torus(1, thickness, major_sections=28, minor_sections=12))


@cache
def _frustum(taper: float, sections: int) -> Shape:
    """A cone's stump of height 1 and radius 1 at the bottom, `taper` at the top; smooth side, flat ends."""
    import trimesh

    outline = [[1, 0], [taper, 1]]
    side = _smooth(trimesh.creation.revolve(outline, sections=sections))
    ends = [trimesh.creation.revolve([[0, 0], [1, 0]], sections=sections)]
    if taper > 0:
        ends.append(trimesh.creation.revolve([[taper, 1], [0, 1]], sections=sections))
    return _joined([side, *map(_flat, ends)])


@cache
def _pill() -> Shape:
    """A capsule with the radius 1 and the ends' centres at z = ±1."""
    import trimesh

    angles = np.linspace(0, np.pi / 2, 3)
    upper = np.stack([np.cos(angles), 1 + np.sin(angles)], -1)
    upper[-1, 0] = 0
    outline = np.concatenate([upper[::-1] * [1, -1], upper])
    vertices, faces, _ = _smooth(trimesh.creation.revolve(outline, sections=14))
    normals = (vertices - np.sign(vertices) * [0, 0, 1])[faces]
    return vertices, faces, normals / np.linalg.norm(normals, axis=-1, keepdims=True)


def _joined(shapes: Sequence[Shape]) -> Shape:
    offsets = np.cumsum([0, *(len(shape[0]) for shape in shapes)])
    return (
        np.concatenate([shape[0] for shape in shapes]),
        np.concatenate([shape[1] + offset for shape, offset in zip(shapes, offsets, strict=False)]).astype(np.int32),
        np.concatenate([shape[2] for shape in shapes]),
    )


def _part(
    shape: Shape,
    surface: Surface,
    scale: Vector,
    centre: Vector,
    rotation: np.ndarray | None = None,
    human: int = 0,
) -> Part:
    """The shape scaled per axis, rotated, then moved to `centre`."""
    vertices, faces, normals = shape
    vertices = vertices * np.asarray(scale)
    if shape is not _cube():
        normals = normals / np.asarray(scale)
        normals = normals / np.sqrt(np.einsum("fcx,fcx->fc", normals, normals))[..., None]
    if rotation is not None:
        vertices, normals = vertices @ rotation.T, normals @ rotation.T
    return Part(vertices + np.asarray(centre), faces, normals, surface, human)


def box(size: Vector, centre: Vector, surface: Surface, *, rotation: np.ndarray | None = None, human: int = 0) -> Part:
    """A box of the given edge lengths."""
    return _part(_cube(), surface, size, centre, rotation, human)


def ellipsoid(
    radii: Vector, centre: Vector, surface: Surface, *, rotation: np.ndarray | None = None, human: int = 0
) -> Part:
    """An ellipsoid of the given semi-axes; small or thin ones have fewer triangles."""
    return _part(_ball(1 if min(radii) < 0.035 else 2), surface, radii, centre, rotation, human)


def cylinder(radius: float, height: float, base: Vector, surface: Surface, *, taper: float = 1.0) -> Part:
    """An upright cylinder standing on `base`; the top's radius is `taper` (rounded to 0.1) times the bottom's."""
    return _part(_frustum(round(taper, 1), 20 if radius > 0.06 else 10), surface, (radius, radius, height), base)


def cone(base: Vector, tip: Vector, radius: float, surface: Surface) -> Part:
    """A cone from the centre of its base to its tip."""
    axis = np.asarray(tip, float) - base
    length = float(np.linalg.norm(axis))
    return _part(_frustum(0.0, 10), surface, (radius, radius, length), base, _upright(axis / length))


def torus(radius: float, thickness: float, centre: Vector, surface: Surface, *, rotation: np.ndarray) -> Part:
    """A ring; `thickness` is the tube's radius over the ring's (rounded to 0.05)."""
    return _part(_ring(round(thickness * 20) / 20), surface, (radius,) * 3, centre, rotation)


def capsule(start: Vector, end: Vector, radius: float, surface: Surface, *, human: int = 0) -> Part:
    """A rounded rod between two points."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    length = float(np.linalg.norm(end - start))
    vertices, faces, normals = _pill()
    stretched = vertices * radius
    stretched[:, 2] += np.sign(vertices[:, 2]) * (length / 2 - radius)
    rotation = _upright((end - start) / max(length, 1e-9))
    return Part(stretched @ rotation.T + (start + end) / 2, faces, normals @ rotation.T, surface, human)


def _upright(axis: np.ndarray) -> np.ndarray:
    """(3, 3) rotation that takes z to the unit vector `axis`."""
    x, y, z = axis.tolist()
    side = math.hypot(x, y)
    if side < 1e-9:
        return np.diag([1.0, math.copysign(1, z), math.copysign(1, z)])
    return np.array([[-y / side, -x * z / side, x], [x / side, -y * z / side, y], [0, side, z]])


def tube(path: np.ndarray, radius: float, surface: Surface, *, sections: int = 8) -> Part:
    """A tube around a closed path (P, 3)."""
    tangent = np.roll(path, -1, axis=0) - np.roll(path, 1, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    outward = path - path.mean(axis=0) + [1e-3, 2e-3, 3e-3]
    first = np.cross(tangent, outward)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(tangent, first)
    angle = np.arange(sections) * 2 * np.pi / sections
    ring = np.cos(angle)[:, None] * first[:, None] + np.sin(angle)[:, None] * second[:, None]
    here = np.arange(len(path))[:, None] * sections + np.arange(sections)
    side, ahead = np.roll(here, -1, axis=1), np.roll(here, -1, axis=0)
    corner = np.roll(side, -1, axis=0)
    faces = np.concatenate([np.stack([here, ahead, side], -1), np.stack([side, ahead, corner], -1)]).reshape(-1, 3)
    normals = ring.reshape(-1, 3)
    return Part((path[:, None] + radius * ring).reshape(-1, 3), faces.astype(np.int32), normals[faces], surface)


def prism(outline: np.ndarray, depth: float, centre: Vector, surface: Surface, *, rotation: np.ndarray) -> Part:
    """A star-shaped outline (P, 2), from x towards z around the origin of the x-z plane, thickened along y."""
    count = len(outline)
    flat = np.stack([outline[:, 0], np.zeros(count), outline[:, 1]], -1)
    offset = np.array([0, depth / 2, 0])
    front, back, hub = flat + offset, flat - offset, np.zeros((count, 3))
    front_next, back_next = np.roll(front, -1, axis=0), np.roll(back, -1, axis=0)
    triangles = np.concatenate(
        [
            np.stack([hub + offset, front_next, front], 1),
            np.stack([hub - offset, back, back_next], 1),
            np.stack([front, front_next, back], 1),
            np.stack([front_next, back_next, back], 1),
        ]
    )
    normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    faces = np.arange(len(triangles) * 3, dtype=np.int32).reshape(-1, 3)
    shape = (triangles.reshape(-1, 3), faces, np.repeat(normal[:, None], 3, axis=1))
    return _part(shape, surface, (1, 1, 1), centre, rotation)
