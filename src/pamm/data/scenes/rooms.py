"""Rooms: walls, what hangs on them, furniture and people in free places, the salient object, and the lights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pamm.data.scenes import furniture, props
from pamm.data.scenes.figures import person
from pamm.data.scenes.solids import Thing, box
from pamm.data.scenes.surfaces import Generator, fabric, surface, wood

CLASSES = (
    "wall", "floor", "ceiling", "window", "door", "picture", "rug", "table", "chair", "sofa", "bed", "cabinet", "lamp",
    "person", "object",
)  # fmt: skip
"""Names of the semantic classes, in the order of their values."""


@dataclass(frozen=True)
class Light:
    """A light that fills a box: centre, half extents (3,), metres, and RGB power, W/sr up to the exposure.

    facing: unit vector into the room for a window, which lights one side only; zero for a lamp. margin: metres around the
    centre in which nothing casts a shadow (the lamp's own shade).
    """

    centre: np.ndarray
    extent: np.ndarray
    power: np.ndarray
    facing: np.ndarray
    margin: float


@dataclass
class Room:
    """A furnished room: width (x), length (y) and height (z), the origin at the middle of the floor."""

    size: np.ndarray
    things: list[Thing] = field(default_factory=list)
    lights: list[Light] = field(default_factory=list)
    ambient: np.ndarray = field(default_factory=lambda: np.ones(3))
    taken: list[np.ndarray] = field(default_factory=list)

    def wall(self, index: int) -> tuple[float, float]:
        """Wall 0 … 3: its length and its distance from the middle of the room."""
        width, length, _ = self.size
        return (width, length / 2) if index % 2 == 0 else (length, width / 2)

    def at_wall(self, thing: Thing, index: int, along: float, height: float = 0.0, gap: float = 0.0) -> Thing:
        """Stand a thing with its back to a wall, `along` metres from the wall's middle and `gap` from its surface."""
        yaw = index * np.pi / 2
        cosine, sine = np.cos(yaw), np.sin(yaw)
        away = self.wall(index)[1] - gap
        return thing.placed(along * cosine + away * sine, along * sine - away * cosine, height, yaw)

    def outline(self, thing: Thing, spare: float = 0.03) -> np.ndarray:
        """(4,) x and y limits of a placed thing's footprint, widened by `spare`."""
        cosine, sine = abs(np.cos(thing.yaw)), abs(np.sin(thing.yaw))
        width, depth = thing.footprint
        half = np.array([width * cosine + depth * sine, width * sine + depth * cosine]) / 2 + spare
        return np.concatenate([np.array(thing.position[:2]) - half, np.array(thing.position[:2]) + half])

    def fits(self, outline: np.ndarray) -> bool:
        """Whether the rectangle lies in the room and touches nothing that stands there."""
        half = self.size[:2] / 2
        if (outline[:2] < -half).any() or (outline[2:] > half).any():
            return False
        return not any((outline[:2] < other[2:]).all() and (other[:2] < outline[2:]).all() for other in self.taken)

    def stand(self, thing: Thing) -> bool:
        """Add the thing where it was placed, if there is room."""
        outline = self.outline(thing)
        if not self.fits(outline):
            return False
        self.taken.append(outline)
        self.things.append(thing)
        return True

    def scatter(self, rng: Generator, thing: Thing, tries: int = 12) -> bool:
        """Stand the thing somewhere on the floor."""
        for _ in range(tries):
            x, y = rng.uniform(-0.5, 0.5, 2) * (self.size[:2] - 0.4)
            if self.stand(thing.placed(float(x), float(y), 0.0, rng.uniform(0, 2 * np.pi))):
                return True
        return False


def _shell(rng: Generator, room: Room) -> None:
    width, length, height = room.size
    walls = ["plain", "plain", "speckle", "stripes", "checks", "dots", "bricks", "tiles", "marble", "planks"]
    papers = [
        surface(rng, walls, axes="xzy", period=(0.12, 0.7), gloss=0.0, contrast=rng.uniform(0.1, 0.7)) for _ in range(2)
    ]
    skirting = wood(rng) if rng.random() < 0.7 else None
    feature = rng.integers(-4, 4)
    for index in range(4):
        side, paper = room.wall(index)[0], papers[1 if index == feature else 0]
        parts = [box((side + 0.4, 0.2, height + 0.4), (0, -0.1, height / 2), paper)]
        if skirting is not None:
            parts.append(box((side, 0.03, 0.1), (0, 0.01, 0.05), skirting))
        room.things.append(room.at_wall(Thing("wall", parts, shell=True), index, 0.0))
    floors = ["planks", "planks", "tiles", "checks", "speckle", "marble", "wood", "plain", "bricks"]
    ground = surface(rng, floors, axes="xyz" if rng.random() < 0.5 else "yxz", period=(0.12, 0.6))
    above = surface(rng, ["plain", "plain", "plain", "tiles", "planks"], period=(0.3, 0.7), contrast=0.3, gloss=0.0,
                    first=np.full(3, rng.uniform(0.5, 0.9)) if rng.random() < 0.7 else None)  # fmt: skip
    extent = (width + 0.4, length + 0.4, 0.2)
    room.things.append(Thing("floor", [box(extent, (0, 0, -0.1), ground)], shell=True))
    room.things.append(Thing("ceiling", [box(extent, (0, 0, height + 0.1), above)], shell=True))


def _hang(rng: Generator, room: Room) -> None:
    """A door, windows (which are lights) and pictures on the walls, none over another."""
    height = room.size[2]
    used: list[tuple[int, float, float]] = []
    wanted = (
        ["door"] * int(rng.random() < 0.75)
        + ["window"] * int(rng.integers(0, 4))
        + ["picture"] * int(rng.integers(1, 7))
    )
    daylight = np.array([0.85, 0.95, 1.1]) if rng.random() < 0.6 else np.array([1.15, 0.9, 0.65])
    for kind in wanted:
        wide = {"door": (0.75, 1.0), "window": (0.7, 1.8), "picture": (0.3, 1.1)}[kind]
        width = rng.uniform(*wide)
        index = int(rng.integers(4))
        along = rng.uniform(-0.5, 0.5) * max(room.wall(index)[0] - width - 0.5, 0)
        if any(index == other and abs(along - place) < (width + extent) / 2 + 0.22 for other, place, extent in used):
            continue
        used.append((index, along, width))
        if kind == "door":
            room.things.append(room.at_wall(props.door(rng, width, rng.uniform(1.95, 2.1)), index, along))
            front = room.at_wall(Thing("door", [], (width, 1.0)), index, along, gap=0.5)
            room.taken.append(room.outline(front, 0.0))
        elif kind == "picture":
            tall = width * rng.uniform(0.6, 1.4)
            middle = min(rng.uniform(1.4, 1.75), height - tall / 2 - 0.1)
            room.things.append(room.at_wall(props.picture(rng, width, tall), index, along, middle))
        else:
            tall = rng.uniform(0.8, 1.4)
            middle = min(rng.uniform(1.4, 1.6), height - tall / 2 - 0.15)
            pane = room.at_wall(props.window(rng, width, tall), index, along, middle)
            room.things.append(pane)
            half = np.abs(pane.rotation() @ [width * 0.3, 0.0, tall * 0.3])
            power = daylight * rng.uniform(1.0, 3.5) * width * tall
            room.lights.append(Light(pane.world((0, 0.16, 0)), half, power, pane.rotation() @ [0.0, 1.0, 0.0], 0.0))


def _furnish(rng: Generator, room: Room) -> None:
    """A group in the middle, then pieces along the walls."""
    if rng.random() < 0.7:
        _group(rng, room)
    names = list(furniture.AGAINST_WALL)
    shares = np.array([furniture.AGAINST_WALL[name][0] for name in names])
    area = float(room.size[0] * room.size[1])
    for _ in range(int(rng.integers(4, 8) + area / 6)):
        build = furniture.AGAINST_WALL[names[rng.choice(len(names), p=shares / shares.sum())]][1]
        thing = build(rng)
        index = int(rng.integers(4))
        free = room.wall(index)[0] - thing.footprint[0] - 0.1
        if free > 0:
            gap = thing.footprint[1] / 2 + rng.uniform(0.07, 0.15)
            room.stand(room.at_wall(thing, index, rng.uniform(-0.5, 0.5) * free, gap=gap))


def _group(rng: Generator, room: Room) -> None:
    """A dining group of a table and chairs, or a sofa with a low table, perhaps on a rug."""
    x, y = rng.uniform(-0.18, 0.18, 2) * room.size[:2]
    yaw = float(rng.integers(4) * np.pi / 2)
    if rng.random() < 0.65:
        carpet = furniture.rug(rng).placed(x, y, 0.0, yaw)
        half = room.size[:2] / 2 - 0.15
        if (np.abs(room.outline(carpet)).reshape(2, 2) < half).all():
            room.things.append(carpet)
    dining = rng.random() < 0.6
    middle = (furniture.table if dining else furniture.low_table)(rng).placed(x, y, 0.0, yaw)
    if not room.stand(middle):
        return
    room.taken.pop()
    look = (wood(rng), fabric(rng))
    axes = middle.rotation()
    for side in range(4):
        reach = middle.footprint[1 - side % 2] / 2
        angle = side * np.pi / 2
        if dining:
            count = 1 if side % 2 or middle.footprint[0] < 1.3 else 2
            for k in range(count):
                if rng.random() < 0.75:
                    out = reach + rng.uniform(0.0, 0.3)
                    shift = (k - (count - 1) / 2) * 0.6
                    place = axes @ _ahead(angle, out, shift)
                    room.stand(
                        furniture.chair(rng, look).placed(
                            x + place[0], y + place[1], 0.0, yaw + angle + rng.normal() * 0.15
                        )
                    )
        elif rng.random() < 0.5:
            seat = furniture.sofa(rng) if side % 2 == 0 else furniture.armchair(rng)
            place = axes @ _ahead(angle, reach + 0.35 + seat.footprint[1] / 2, 0.0)
            room.stand(seat.placed(x + place[0], y + place[1], 0.0, yaw + angle))
    room.taken.append(room.outline(middle))


def _ahead(angle: float, out: float, shift: float) -> np.ndarray:
    """Where something stands that faces the origin from the side -y, turned by `angle` around it."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([shift * cosine + out * sine, shift * sine - out * cosine, 0.0])


def _decorate(rng: Generator, room: Room) -> None:
    """Small things on furniture and floor, people standing or seated, and last the salient object."""
    tops = [(thing, top) for thing in room.things for top in thing.tops]
    seats = [(thing, seat) for thing in room.things for seat in thing.seats]
    stage = rng.permutation(len(tops))[:1] if tops and rng.random() < 0.55 else []
    small: list[Thing] = []
    for index, (thing, top) in enumerate(tops):
        for side in (-1, 1):
            if index not in stage and rng.random() < 0.45:
                item = furniture.lamp(rng, rng.uniform(0.35, 0.6)) if rng.random() < 0.2 else props.trinket(rng)
                small.append(
                    _put(rng, item, thing, (top[0] + side * top[3] * 0.28, top[1], top[2], top[3] * 0.3, top[4] * 0.5))
                )
    for _ in range(int(rng.integers(0, 4))):
        room.scatter(rng, props.plant(rng, rng.uniform(0.6, 1.3)) if rng.random() < 0.4 else props.trinket(rng), 4)
    room.things += small
    free = rng.permutation(len(seats)).tolist()
    people = []
    for _ in range(rng.choice(4, p=[0.25, 0.4, 0.25, 0.1])):
        if free and rng.random() < 0.4:
            thing, seat = seats[free.pop()]
            people.append(person(rng, seat).placed(*thing.position, yaw=thing.yaw))
        elif room.scatter(rng, person(rng)):
            people.append(room.things.pop())
    room.things += people
    treasure = props.salient(rng)
    if len(stage):
        room.things.append(_put(rng, treasure, *tops[stage[0]]))
    elif not room.scatter(rng, treasure, 40):
        room.things.append(treasure.placed(0.0, 0.0))


def _put(rng: Generator, item: Thing, thing: Thing, top: tuple[float, ...]) -> Thing:
    """Stand an item on a top (x, y, z, width, depth) of a placed thing."""
    spread = np.maximum(np.array(top[3:]) - item.footprint, 0) / 2
    spot = thing.world((*(np.array(top[:2]) + rng.uniform(-1, 1, 2) * spread), top[2] + 0.001))
    return item.placed(*spot.tolist(), yaw=rng.uniform(0, 2 * np.pi))


def _light(rng: Generator, room: Room) -> None:
    """One or two ceiling lamps beside the windows, and the light that comes from everywhere."""
    warmth = rng.uniform(0, 1)
    tint = (1 - warmth) * np.array([0.85, 0.95, 1.15]) + warmth * np.array([1.2, 0.92, 0.6])
    for _ in range(1 if room.lights or rng.random() < 0.7 else 2):
        x, y = rng.uniform(-0.3, 0.3, 2) * room.size[:2]
        top = room.size[2]
        room.things.insert(6, furniture.ceiling_lamp(rng).placed(x, y, top, rng.integers(2) * np.pi / 2))
        extent = np.array([*rng.uniform(0.02, 0.2, 2), 0.02])
        power = tint * rng.uniform(0.6, 4.0)
        room.lights.append(Light(np.array([x, y, top - 0.12]), extent, power, np.zeros(3), 0.75))
    room.ambient = (tint + rng.uniform(0.7, 1.1, 3)) * rng.uniform(0.06, 0.22)


def furnish(rng: Generator) -> Room:
    """A random furnished room."""
    room = Room(np.array([rng.uniform(3.2, 6.5), rng.uniform(3.2, 6.5), rng.uniform(2.35, 3.1)]))
    _shell(rng, room)
    _hang(rng, room)
    _furnish(rng, room)
    _decorate(rng, room)
    _light(rng, room)
    if len(room.lights) > 2:
        room.lights = [room.lights[-1], *sorted(room.lights[:-1], key=lambda light: -light.power.sum())[:1]]
    return room
