"""Features of each stage and task, three principal components as colours (`pamm look features`; paper Fig. 7, 9, 10)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from pamm.drawing.colours import fit
from pamm.drawing.layout import TILE, Block, Tile, compose
from pamm.drawing.sheet import TRUTH, Subject, truth_row
from pamm.look import LookError
from pamm.look.readout import FUSED, GENERAL, reading
from pamm.prediction import Predictor

Sharing = Literal["per-task", "shared"]

TAILS = 1.0
"""Percent of the tokens that may lie beyond black, and beyond white, of a component."""


@dataclass(frozen=True)
class Components:
    """Principal components: mean (d,), axes (count, d) of length 1 or 0, shares (count,) of the variance, falling."""

    mean: np.ndarray
    axes: np.ndarray
    shares: np.ndarray

    def project(self, features: np.ndarray) -> np.ndarray:
        """(..., d) → (..., count)."""
        return (features - self.mean) @ self.axes.T


def principal_components(features: np.ndarray, count: int = 3) -> Components:
    """Principal components in float64.

    An axis points to where its largest loading is positive, so the result is unique. Directions without variance have an axis
    of zeros and the share 0.

    Args:
        features: (tokens, d).
        count: number of components, 1 or more.

    Returns:
        Mean, axes and shares of the variance.

    Raises:
        LookError: the features are not finite, or have another shape.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or 0 in features.shape or not np.isfinite(features).all():
        raise LookError(
            f"expected finite features of shape (tokens, d), found shape {features.shape}, or values that are not"
        )
    mean = features.mean(0)
    centred = features - mean
    wide = centred.shape[0] < centred.shape[1]
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count].T
    axes, shares = np.zeros((count, features.shape[1])), np.zeros(count)
    total = float((centred**2).sum())
    for k, (value, vector) in enumerate(zip(values.tolist(), vectors, strict=True)):
        axis = vector @ centred if wide else vector
        length = np.linalg.norm(axis)
        if total > 0 and value > 1e-12 * total and length > 0:
            axis = axis / length
            axes[k], shares[k] = axis * np.sign(axis[np.abs(axis).argmax()]), value / total
    return Components(mean, axes, shares)


@dataclass(frozen=True)
class FeatureMap:
    """One feature map, values (h, w, d) of the padded frame, and where the image lies in it.

    rows, columns: first and last edge of the image as shares of the frame, 0..1.
    """

    values: np.ndarray
    rows: tuple[float, float]
    columns: tuple[float, float]

    def inside(self) -> np.ndarray:
        """(h, w) bool: whether a token's centre lies in the image; at least one does."""
        lines = [_inside(side, *ends) for side, ends in zip(self.values.shape, (self.rows, self.columns), strict=False)]
        return lines[0][:, None] & lines[1]

    def cut_out(self, colours: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(h, w, 3) colours of the tokens → the image's part, (*size, 3), every pixel the colour of the token it lies in."""
        places = []
        for side, (first, last), pixels in zip(colours.shape, (self.rows, self.columns), size, strict=False):
            at = first + (np.arange(pixels) + 0.5) / pixels * (last - first)
            places.append(np.minimum((at * side).astype(int), side - 1))
        return colours[places[0]][:, places[1]]


def _inside(side: int, first: float, last: float) -> np.ndarray:
    centres = (np.arange(side) + 0.5) / side
    inside = (centres >= first) & (centres <= last)
    if not inside.any():
        inside[int(np.abs(centres - (first + last) / 2).argmin())] = True
    return inside


Maps = dict[str, dict[str, FeatureMap]]
"""Row ("stage 1", …, "fused") → column ("backbone", the tasks) → map of one image."""


def read_features(predictor: Predictor, image: np.ndarray) -> Maps:
    """Read the features of one image, prepared as for a prediction.

    Args:
        predictor: the network.
        image: (H, W, 3) uint8 RGB.

    Returns:
        Row → column → map of features.

    Raises:
        LookError: the network has no features to read.
    """
    with reading(predictor.model) as seen:
        logits, rows, columns = predictor.logits(image)
        found = seen.features(predictor.model)
    height, width = next(iter(logits.values())).shape[-2:]
    place = (rows.start / height, rows.stop / height), (columns.start / width, columns.stop / width)
    return {
        row: {name: FeatureMap(x[0].permute(1, 2, 0).float().cpu().numpy(), *place) for name, x in columns_.items()}
        for row, columns_ in found.items()
    }


def fit_components(images: Sequence[Maps], sharing: Sharing = "per-task") -> dict[tuple[str, str], Components]:
    """(row, column) → components of the tokens of all images, padding left out.

    "per-task": a PCA per row and column. "shared": in each row one for all tasks, with one mean; the backbone's own apart,
    since its features live in another space.
    """
    found = {}
    for row, columns in images[0].items():
        tokens = {
            name: np.concatenate([m[row][name].values[m[row][name].inside()] for m in images]) for name in columns
        }
        tasks = [name for name in tokens if name != GENERAL]
        groups = [[name] for name in tokens] if sharing == "per-task" else [[GENERAL], tasks]
        for group in groups:
            components = principal_components(np.concatenate([tokens[name] for name in group]))
            found |= {(row, name): components for name in group}
    return found


def color_features(
    images: Sequence[Maps], components: Mapping[tuple[str, str], Components]
) -> list[dict[tuple[str, str], np.ndarray]]:
    """Per image, (row, column) → (h, w, 3) float in 0..1: the components as red, green and blue.

    Each component's range, between its percentiles `TAILS` and 100 − `TAILS`, is that of all maps with the same PCA, over
    all images, so that in these one colour is one feature. A component without variance is 0.5.
    """
    scores = [
        {(r, c): components[r, c].project(m.values) for r, cs in maps.items() for c, m in cs.items()} for maps in images
    ]
    colored: list[dict[tuple[str, str], np.ndarray]] = [{} for _ in images]
    groups: dict[int, list[tuple[str, str]]] = {}
    for key, own in components.items():
        groups.setdefault(id(own), []).append(key)
    for keys in groups.values():
        tokens = [s[r, c][m[r][c].inside()] for m, s in zip(images, scores, strict=True) for r, c in keys]
        low, high = np.percentile(np.concatenate(tokens), [TAILS, 100 - TAILS], axis=0)
        span = high - low
        for image, own in zip(colored, scores, strict=True):
            for key in keys:
                scaled = (own[key] - low) / np.where(span > 0, span, 1)
                image[key] = np.where(span > 0, np.clip(scaled, 0, 1), 0.5)
    return colored


@dataclass(frozen=True)
class Look:
    """One model's features of some images: maps and colours per image, and the components of each (row, column)."""

    maps: list[Maps]
    colours: list[dict[tuple[str, str], np.ndarray]]
    components: dict[tuple[str, str], Components]


def look_at_features(
    predictor: Predictor,
    images: Iterable[np.ndarray],
    *,
    sharing: Sharing = "per-task",
    rows: Sequence[str] | None = None,
) -> Look:
    """Read the features of images, reduce them to three components, and colour them.

    Args:
        predictor: the network.
        images: (H, W, 3) uint8 RGB images.
        sharing: "per-task" or "shared": which maps share a PCA.
        rows: names of the rows to show, e.g. "stage 1" or "fused"; None shows all.

    Returns:
        The maps, their colours, and the components of each (row, column).

    Raises:
        LookError: a row does not exist, or the network has no features to read.
    """
    maps = []
    for image in images:
        found = read_features(predictor, image)
        for row in rows or ():
            if row not in found:
                raise LookError(f"--stages: no '{row.removeprefix('stage ')}' in this model, which has {_rows(found)}")
        maps.append({row: found[row] for row in rows or found})
    components = fit_components(maps, sharing)
    return Look(maps, color_features(maps, components), components)


def _rows(found: Mapping[str, object]) -> str:
    return ", ".join(row.removeprefix("stage ") for row in found)


def feature_figure(
    looks: Mapping[str, Look],
    subjects: Sequence[Subject],
    number: int,
    tasks: Sequence[str],
    *,
    sharing: Sharing = "per-task",
    tile: int = TILE,
) -> Image.Image:
    """The figure of image `number`: a row per model and stage, a column for the backbone and each task; the truth below."""
    subject = subjects[number]
    image = fit(subject.image, tile)
    rows: list[tuple[str, dict[str, Tile]]] = []
    for model, look in looks.items():
        for row, columns in look.maps[number].items():
            tiles = {} if rows else {"image": Tile(image)}
            for name in (GENERAL, *tasks):
                if name in columns:
                    colours = np.rint(255 * look.colours[number][row, name]).astype(np.uint8)
                    picture = columns[name].cut_out(colours, (image.height, image.width))
                    tiles[name] = Tile(Image.fromarray(picture), shares_text(look.components[row, name]))
            rows.append((f"{model}: {row}" if len(looks) > 1 else row, tiles))
    if any(task in subject.truths for task in tasks):
        rows.append((TRUTH, truth_row(subject, tasks, tile=tile)))
    return compose([Block(rows, subject.name)], caption=caption(looks, len(subjects), sharing), tile=tile)


def shares_text(components: Components) -> str:
    """Shares of the variance, e.g. "61 + 20 + 9 %"."""
    return f"{' + '.join(f'{100 * share:.0f}' for share in components.shares)} %"


def caption(looks: Mapping[str, Look], images: int, sharing: Sharing) -> str:
    """The meaning of the colours."""
    over = "this image" if images == 1 else f"{images} images"
    models = "model, " if len(looks) > 1 else ""
    text = (
        "First three principal components of the features as red, green and blue; below, their shares of the variance. "
    )
    if sharing == "per-task":
        text += f"One PCA per {models}stage and task over {over}: colours distinguish regions of a tile and "
        text += "do not compare between tiles" + (" of one figure." if images > 1 else ".")
    else:
        text += f"One PCA per {models}stage for all tasks together over {over}, one for the backbone: in a row, tasks of one "
        text += "colour have one feature."
    if any(FUSED in maps for look in looks.values() for maps in look.maps):
        text += " fused: what the Task Decoder gives to the heads, beside the backbone's last stage."
    return text
