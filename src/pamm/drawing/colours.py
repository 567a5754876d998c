"""Pictures of maps, and what their colours mean: classes, words, and bars of values."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from pamm.drawing.layout import Colour, Meaning, labelled_bar, text_width
from pamm.tasks import Task


def legend(task: Task, present: Iterable[int] | None = None) -> dict[str, Colour]:
    """Class name → colour in the task's pictures, of all classes or those `present`; empty for a task without classes."""
    classes: Sequence[str] = getattr(task, "classes", ())
    shown = sorted(range(len(classes)) if present is None else {i for i in present if i < len(classes)})
    if not shown:
        return {}
    colours = task.draw(np.array([shown], np.uint8))[0]
    return {classes[i]: (int(r), int(g), int(b)) for i, (r, g, b) in zip(shown, colours, strict=True)}


def colour_meanings(
    tasks: Mapping[str, Task], present: Mapping[str, Iterable[int]] | None = None
) -> dict[str, Meaning]:
    """Task → its legend, of the classes `present` if they are given, or its words; without tasks that have neither."""
    shown = present or {}
    found = {name: legend(task, shown.get(name)) or task.colours for name, task in tasks.items()}
    return {name: meaning for name, meaning in found.items() if meaning}


class Pair(NamedTuple):
    """Pictures (H, W, 3) uint8 of a prediction and its truth, on one scale, and that scale (see `Task.scale`)."""

    prediction: np.ndarray
    truth: np.ndarray | None
    scale: tuple[float, float] | None


def draw_pair(task: Task, logits: Tensor, label: Tensor | None) -> Pair:
    """(channels, H, W) logits, (c, H, W) label → their pictures on the truth's scale, or on the prediction's own without one.

    Ignored pixels of the truth are grey; a label that is None or ignored everywhere has no picture.
    """
    prediction, truth, picture = task.decode(logits[None])[0].cpu().numpy(), None, None
    if label is not None and (valid := task.valid(label)[0].cpu().numpy()).any():
        values = task.truth(label).cpu().numpy()
        truth = np.where(valid.reshape(valid.shape + (1,) * (values.ndim - 2)), values, np.zeros_like(values))
        picture = task.draw(truth, valid=valid, reference=truth)
    return Pair(task.draw(prediction, reference=truth), picture, task.scale(prediction if truth is None else truth))


def scale_text(task: Task, scale: tuple[float, float]) -> str:
    """A range of values in the task's unit, in words, e.g. "0.52 to 9.81 m"."""
    low, high = _ends(scale)
    return f"{low} to {high} {task.map_unit}".rstrip()


def _ends(scale: tuple[float, float]) -> tuple[str, str]:
    """Both values with the decimals that show three digits of the higher one."""
    digits = max(0, 2 - math.floor(math.log10(max(scale[1], 1e-6))))
    return f"{scale[0]:.{digits}f}", f"{scale[1]:.{digits}f}"


def scale_bar(task: Task, scale: tuple[float, float], width: int, *, text: int = 12) -> Image.Image:
    """The colours of `draw` from the lowest to the highest value of a range, with both values and the unit below them.

    Args:
        width: pixels at least; the values may need more.
        text: size of the letters, pixels.
    """
    low, high = (f"{value} {task.map_unit}".rstrip() for value in _ends(scale))
    width = max(width, text_width(low, text) + text_width(high, text) + text)
    colours = task.draw(np.linspace(*scale, width)[None], reference=np.array([scale]))[0]
    return labelled_bar(colours, low, high, text=text)


def fit(picture: np.ndarray, side: int) -> Image.Image:
    """(H, W, 3) uint8 → a picture whose longer side is `side`, no side below 1 pixel."""
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    method = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize(size, method)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    """The picture as a file of this kind: "png", "jpeg"."""
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def data_uri(picture: Image.Image, *kinds: str) -> str:
    """The picture as a data URI: the smallest of the files of these kinds, "png" and "jpeg"; by default a PNG."""
    options = {"png": {}, "jpeg": {"quality": 88, "subsampling": 0}}
    files = {kind: encoded(picture, kind, **options[kind]) for kind in kinds or ("png",)}
    kind = min(files, key=lambda kind: len(files[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}"
