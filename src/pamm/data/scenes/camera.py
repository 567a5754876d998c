"""The camera: a pinhole in the room, and the choice of a view that shows what the tasks need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pamm.data.scenes.geometry import Geometry
from pamm.data.scenes.rooms import CLASSES, Room
from pamm.data.scenes.surfaces import Generator


@dataclass(frozen=True)
class Camera:
    """A pinhole: its place, the rows right, up and towards the viewer of `axes` (3, 3), and half of the longer side's view angle.

    tangent: tangent of that half angle.
    """

    place: np.ndarray
    axes: np.ndarray
    tangent: float

    def rays(self, size: tuple[int, int], samples: int = 1) -> np.ndarray:
        """(H·W·samples², 3) world directions through the pixels, whose parameter along the ray is the depth.

        The samples of a pixel are consecutive, on a regular grid in it; a single one goes through its centre. Not a
        matrix product: those differ in the last bit with the number of threads.
        """
        height, width = size
        offset = (np.arange(samples) + 0.5) / samples
        rows = (np.arange(height)[:, None] + offset).reshape(height, 1, samples, 1)
        columns = (np.arange(width)[:, None] + offset).reshape(1, width, 1, samples)
        scale = 2 * self.tangent / max(size)
        grid = np.broadcast_arrays((columns - width / 2) * scale, (height / 2 - rows) * scale, -1.0)
        return np.einsum("nx,xy->ny", np.stack([axis.reshape(-1) for axis in grid], -1), self.axes)


def look(place: np.ndarray, target: np.ndarray, roll: float, tangent: float) -> Camera:
    """A camera at `place` that looks at `target`."""
    back = place - target
    back = back / np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    up = np.cross(back, right)
    cosine, sine = np.cos(roll), np.sin(roll)
    return Camera(place, np.stack([cosine * right + sine * up, cosine * up - sine * right, back]), tangent)


def choose(rng: Generator, room: Room, geometry: Geometry, size: tuple[int, int], tries: int = 14) -> Camera:
    """The best of some random views: near enough to the salient object and people, far enough from everything."""
    height, width = (int(np.clip(round(18 * side / min(size)), 4, 64)) for side in size)
    best, best_score = None, -np.inf
    for _ in range(tries):
        place = np.array([*(rng.uniform(-0.46, 0.46, 2) * room.size[:2]), rng.uniform(0.9, 1.9)])
        goal = np.array([*(rng.uniform(-0.35, 0.35, 2) * room.size[:2]), rng.uniform(0.4, 1.3)])
        if rng.random() < 0.6:
            things = [thing for thing in room.things if thing.salient or thing.label == "person"]
            things += [thing for thing in things if thing.salient]
            goal = 0.5 * goal + 0.5 * things[rng.integers(len(things))].world((0, 0, 0.6))
        if np.linalg.norm(goal[:2] - place[:2]) < 1.0:
            continue
        camera = look(place, goal, rng.normal() * 0.03, np.tan(np.radians(rng.uniform(50, 85) / 2)))
        score = _score(camera, geometry, (height, width))
        if score > best_score:
            best, best_score = camera, score
    return best or look(np.array([*(-0.45 * room.size[:2]), 1.5]), np.array([0, 0, 0.8]), 0.0, 0.7)


def _score(camera: Camera, geometry: Geometry, shape: tuple[int, int]) -> float:
    """How much a view shows: kinds of things, the salient object, people; and that nothing stands in front of the camera."""
    hit = geometry.cast(camera.place, camera.rays(shape))
    part = geometry.part[hit.triangle]
    shares = np.bincount(geometry.label[part], minlength=len(CLASSES)) / len(part)
    salient = float(geometry.salient[part].mean())
    score = 0.6 * np.count_nonzero(shares > 0.01) + 8 * min(shares[CLASSES.index("person")], 0.15)
    score += 4 * float(salient > 0.008) + 60 * min(salient, 0.05) - 20 * max(salient - 0.2, 0.0)
    return score - 8 * float(hit.distance.min() < 0.55) - 6 * max(float(np.max(shares)) - 0.5, 0.0)
