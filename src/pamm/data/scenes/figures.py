"""Human figures: a jointed skeleton in a random pose, dressed in solids that carry their human part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pamm.data.scenes.solids import Part, Thing, capsule, ellipsoid, turn
from pamm.data.scenes.surfaces import Generator, Surface, fabric, plain

PARTS = ("background", "head", "torso", "upper_arm", "lower_arm", "upper_leg", "lower_leg")
"""Names of the human-part classes, in the order of their values."""
HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG = range(1, 7)


@dataclass(frozen=True)
class Clothes:
    """Surfaces of a figure's body."""

    skin: Surface
    hair: Surface
    shirt: Surface
    trousers: Surface
    shoes: Surface
    upper_arm: Surface
    lower_arm: Surface
    lower_leg: Surface


def _clothes(rng: Generator) -> Clothes:
    tone = np.array([[0.78, 0.52, 0.4], [0.6, 0.36, 0.24], [0.38, 0.2, 0.12], [0.16, 0.08, 0.05]])[rng.integers(4)]
    skin = plain(rng, np.clip(tone * rng.uniform(0.85, 1.15), 0.02, 0.9), gloss=0.1)
    hair = plain(rng, np.array([0.5, 0.33, 0.16]) * rng.beta(0.6, 1.2) + 0.02, gloss=0.2)
    shirt, trousers = fabric(rng), fabric(rng)
    sleeves = rng.integers(3)
    return Clothes(
        skin,
        hair,
        shirt,
        trousers,
        plain(rng),
        upper_arm=shirt if sleeves > 0 else skin,
        lower_arm=shirt if sleeves > 1 else skin,
        lower_leg=trousers if rng.random() < 0.75 else skin,
    )


@dataclass(frozen=True)
class Pose:
    """Joint angles, radians. Pairs are (left, right); forward swings and bends are positive."""

    lean: float
    nod: float
    look: float
    shoulder: tuple[float, float]
    spread: tuple[float, float]
    elbow: tuple[float, float]
    hip: tuple[float, float]
    straddle: tuple[float, float]
    knee: tuple[float, float]


def _pose(rng: Generator, sitting: bool) -> Pose:
    """A random pose: standing still, walking or sitting, with hanging, bent, raised or spread arms."""

    def pair(low: float, high: float) -> tuple[float, float]:
        return float(rng.uniform(low, high)), float(rng.uniform(low, high))

    arms = [
        (pair(-0.3, 0.3), pair(0.05, 0.25), pair(0.0, 0.5)),
        (pair(0.2, 0.9), pair(0.0, 0.3), pair(0.6, 1.8)),
        (pair(1.2, 2.9), pair(0.0, 0.6), pair(0.0, 0.9)),
        (pair(-0.2, 0.3), pair(0.9, 1.7), pair(0.0, 0.8)),
        ((float(rng.uniform(-0.2, 0.3)), 2.6), pair(0.1, 0.5), pair(0.1, 0.7)),
    ]
    shoulder, spread, elbow = arms[rng.choice(5, p=[0.3, 0.3, 0.13, 0.12, 0.15])]
    if sitting:
        hip, straddle, knee = pair(1.35, 1.6), pair(0.05, 0.3), pair(1.2, 1.6)
    elif rng.random() < 0.4:
        stride = rng.uniform(0.25, 0.65) * rng.choice([-1, 1])
        hip, straddle = (stride, -stride), pair(0.0, 0.06)
        knee = (0.15 + max(0.0, -stride), 0.15 + max(0.0, stride))
    else:
        hip, straddle, knee = pair(-0.05, 0.12), pair(0.02, 0.2), pair(0.0, 0.15)
    lean = rng.uniform(-0.15, 0.1) if sitting else rng.uniform(-0.08, 0.12)
    return Pose(lean, rng.uniform(-0.2, 0.35), rng.uniform(-0.7, 0.7), shoulder, spread, elbow, hip, straddle, knee)


def _limb(swing: float, spread: float) -> np.ndarray:
    """Unit direction of a limb that hangs down, swung forward (+y) and spread towards +x."""
    return np.array([np.sin(spread), np.sin(swing) * np.cos(spread), -np.cos(swing) * np.cos(spread)])


def _arm(side: int, shoulder: np.ndarray, torso: np.ndarray, pose: Pose, wear: Clothes, h: float) -> list[Part]:
    index = (side + 1) // 2
    mirror = np.array([side, 1, 1])
    upper = torso @ (_limb(pose.shoulder[index], pose.spread[index]) * mirror)
    lower = torso @ (_limb(pose.shoulder[index] + pose.elbow[index], pose.spread[index] * 0.4) * mirror)
    elbow = shoulder + 0.165 * h * upper
    wrist = elbow + 0.14 * h * lower
    return [
        capsule(shoulder, elbow, 0.029 * h, wear.upper_arm, human=UPPER_ARM),
        capsule(elbow, wrist, 0.023 * h, wear.lower_arm, human=LOWER_ARM),
        capsule(wrist, wrist + 0.045 * h * lower, 0.024 * h, wear.skin, human=LOWER_ARM),
    ]


def _leg(side: int, pelvis: np.ndarray, pose: Pose, wear: Clothes, h: float) -> list[Part]:
    index = (side + 1) // 2
    mirror = np.array([side, 1, 1])
    upper = _limb(pose.hip[index], pose.straddle[index]) * mirror
    lower = _limb(pose.hip[index] - pose.knee[index], pose.straddle[index] * 0.5) * mirror
    joint = pelvis + np.array([side * 0.052 * h, 0, 0])
    knee = joint + 0.245 * h * upper
    ankle = knee + 0.225 * h * lower
    toes = ankle + h * np.array([0.005 * side, 0.075, -0.02])
    return [
        capsule(joint, knee, 0.045 * h, wear.trousers, human=UPPER_LEG),
        capsule(knee, ankle, 0.033 * h, wear.lower_leg, human=LOWER_LEG),
        capsule(ankle - [0, 0.015 * h, 0.015 * h], toes, 0.024 * h, wear.shoes, human=LOWER_LEG),
    ]


def _head(neck: np.ndarray, torso: np.ndarray, pose: Pose, rng: Generator, wear: Clothes, h: float) -> list[Part]:
    frame = torso @ turn(pose.look, -pose.nod)
    centre = neck + frame @ (h * np.array([0, 0.01, 0.085]))
    parts = [ellipsoid(h * np.array([0.045, 0.053, 0.066]), centre, wear.skin, rotation=frame, human=HEAD)]
    parts.append(
        ellipsoid(h * np.array([0.009, 0.016, 0.012]), centre + frame @ [0, 0.053 * h, 0], wear.skin, human=HEAD)
    )
    eye = plain(rng, np.full(3, 0.02), gloss=0.4)
    for side in (-1, 1):
        at = centre + frame @ (h * np.array([side * 0.019, 0.044, 0.015]))
        parts.append(ellipsoid(h * np.array([0.007, 0.007, 0.006]), at, eye, human=HEAD))
    if rng.random() < 0.92:
        crown = centre + frame @ (h * np.array([0, -0.014, 0.02]))
        parts.append(ellipsoid(h * np.array([0.05, 0.052, 0.058]), crown, wear.hair, rotation=frame, human=HEAD))
        if rng.random() < 0.4:
            fall = centre + frame @ (h * np.array([0, -0.035, -0.035]))
            parts.append(ellipsoid(h * np.array([0.045, 0.028, 0.085]), fall, wear.hair, rotation=frame, human=HEAD))
    return parts


def person(rng: Generator, seat: tuple[float, ...] | None = None) -> Thing:
    """A figure facing +y, standing at its origin, or sitting on `seat` (x, y, z) of a thing placed like itself."""
    height = rng.uniform(1.5, 1.9) if seat is not None or rng.random() < 0.8 else rng.uniform(1.0, 1.4)
    wear, pose = _clothes(rng), _pose(rng, seat is not None)
    girth = rng.uniform(0.9, 1.25)
    torso = turn(0, -pose.lean)
    pelvis = np.zeros(3)
    hips = pelvis + np.array([0, 0, 0.02 * height])
    chest, neck = torso @ [0, 0, 0.2 * height], torso @ [0, 0, 0.315 * height]
    shape = height * np.array([0.098, 0.066 * girth, 0.125])
    parts = [
        ellipsoid(height * np.array([0.088, 0.064 * girth, 0.075]), hips, wear.trousers, human=TORSO),
        ellipsoid(shape, chest, wear.shirt, rotation=torso, human=TORSO),
        ellipsoid(
            height * np.array([0.082, 0.058 * girth, 0.12]), chest * 0.6, wear.shirt, rotation=torso, human=TORSO
        ),
        capsule(chest, neck + torso @ [0, 0, 0.03 * height], 0.03 * height, wear.skin, human=TORSO),
    ]
    for side in (-1, 1):
        shoulder = torso @ (height * np.array([side * 0.11, 0, 0.275]))
        parts.append(capsule(torso @ [0, 0, 0.275 * height], shoulder, 0.036 * height, wear.shirt, human=TORSO))
        parts += _arm(side, shoulder, torso, pose, wear, height) + _leg(side, pelvis, pose, wear, height)
    parts += _head(neck, torso, pose, rng, wear, height)
    if seat is None:
        shift = np.array([0, 0, -min(part.vertices[:, 2].min() for part in parts)])
    else:
        shift = np.array([seat[0], seat[1] - 0.08, seat[2] + 0.05 * height])
    moved = [Part(p.vertices + shift, p.faces, p.normals, p.surface, p.human) for p in parts]
    return Thing("person", moved, (0.55, 0.45))
