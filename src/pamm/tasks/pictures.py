"""Label files in and out, and the colours of pictures: what the tasks share."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pamm.images import MAX_PIXELS, NOTE, ImageError, LabelPicture, open_label
from pamm.tasks.task import LabelError

STRIP_VALUES = 2**22
"""Values that are encoded at once."""

GREY = 128
"""Level of pixels that are not drawn."""


INDICES = MappingProxyType({"grey": (1, 2, 4, 8), "palette": (1, 2, 4, 8)})
"""Kinds of PNG, each with the bits of a value, that hold class indices."""


def read_png(path: Path, kinds: Mapping[str, Sequence[int]], expected: str) -> np.ndarray:
    """Values that a label PNG stores, (H, W) or (H, W, channels), see `LabelPicture.values`.

    kinds: the kinds of PNG accepted and the bits of their values. expected: what the file should hold, for the message.
    Raises LabelError for a file that is absent, empty, damaged, not a PNG, of another kind or implausibly large.
    """
    with open_png(path, kinds, expected) as label:
        return label.values()


@contextmanager
def open_png(path: Path, kinds: Mapping[str, Sequence[int]], expected: str) -> Iterator[LabelPicture]:
    """The header of a label PNG, checked as `read_png` says."""
    path = Path(path)
    check_readable(path, f"expected {expected}; write it, or leave the image without this label")
    try:
        with open_label(path) as label:
            _check_label(label, kinds, expected)
            yield label
    except ImageError as error:
        raise LabelError(f"{error} Expected {expected}.") from None


def _check_label(label: LabelPicture, kinds: Mapping[str, Sequence[int]], expected: str) -> None:
    if label.bits not in kinds.get(label.kind, ()):
        article = "an" if label.bits == 8 else "a"
        raise LabelError(f"{label.path} is {article} {label} PNG, expected {expected}; convert the label")
    if label.width * label.height > MAX_PIXELS:
        raise LabelError(
            f"{label.path} is implausibly large for a label: {label.height} x {label.width} pixels, the limit is "
            f"{MAX_PIXELS:,}; shrink it together with its image"
        )


def check_readable(path: Path, remedy: str) -> None:
    """Raise LabelError unless the file can be opened; the message gives the reason."""
    try:
        with open(path, "rb"):
            return
    except FileNotFoundError:
        what = f"{path} is a broken link" if os.path.islink(path) else f"no label file {path}"
        raise LabelError(f"{what}: {remedy}") from None
    except PermissionError:
        raise LabelError(f"{path} may not be read: change the permissions of the file or of its folder") from None
    except (OSError, ValueError) as error:
        raise LabelError(f"{path} cannot be opened ({getattr(error, 'strerror', None) or error}): {remedy}") from None


def read_mask(path: Path, *, soft: bool = False) -> np.ndarray:
    """Grey PNG of 1 to 8 bits → (H, W) uint8 mask: 0 where the value is 0, 1 where it is the largest of its bits.

    Other values are refused: a third value may mean that a pixel is unknown, and 0 and 1, 2 or 100 in 8 bits would all
    be black. In a map of probabilities, or a mask with softened edges, more than half is a yes. Such is a file with many
    levels (`LEVELS`) of which some are above half, one that this library wrote as such (`PROBABILITY`), and every file
    where `soft` is set. Raises LabelError.
    """
    expected = "a grey PNG, 0 = no, 255 = yes"
    with open_png(path, {"grey": (1, 2, 4, 8)}, expected) as label:
        values, full, soft = label.values(), 2**label.bits - 1, soft or label.note == PROBABILITY
    expected = expected.replace("255", str(full))
    if full > 1 and values.max() == 1:
        raise LabelError(f"{path} holds the values 0 and 1 only, expected {expected}; multiply it by {full}")
    if not soft and not ((values == 0) | (values == full)).all():
        found = np.unique(values).tolist()
        if len(found) < LEVELS or found[-1] <= full // 2:
            raise LabelError(
                f"{path} holds the values {listed(found)}, expected {expected}. Write a mask of these two values; for a map of "
                "probabilities, of which more than half is a yes, set the task's option soft: true"
            )
    return (values > full // 2).astype(np.uint8)


def listed(values: Sequence[object], most: int = 8) -> str:
    """The first few values as text, and how many more there are."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return (", " if more or len(values) > 2 else " and ").join(map(str, values[:most])) + more


LEVELS = 16
"""Different values from which on a mask of more than two is taken for a map of probabilities: codes and indices are fewer."""

PROBABILITY = "probability"
"""Note of a PNG whose levels of grey are probabilities, 255 = 1."""


def mask_pixels(label: torch.Tensor) -> dict[str, int]:
    """Pixels of a (1, H, W) mask that are a no and a yes."""
    return {"no": int((label == 0).sum()), "yes": int((label == 1).sum())}


def png_bytes(values: np.ndarray, note: str = "") -> bytes:
    """(H, W) uint8 or uint16 or (H, W, 3) uint8 → a PNG file; `note` describes its values."""
    text = PngInfo()
    if note:
        text.add_text(NOTE, note)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue()


def probability_png(probability: np.ndarray) -> bytes:
    """(H, W) in [0, 1] → 8-bit grey PNG, rounded, so that 0.5 and more reads back as 1."""
    return png_bytes(to_byte(probability), PROBABILITY)


def to_byte(values: np.ndarray) -> np.ndarray:
    """Float array in [0, 1] → uint8 in [0, 255], rounded to nearest; NaN → 0."""
    return by_strips(lambda part: np.rint(np.clip(np.nan_to_num(part), 0, 1) * 255).astype(np.uint8), values)


def by_strips(function: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """(H, ...) → `function` of it, strip by strip of rows, so that what is computed on the way stays small."""
    values = np.asarray(values)
    if values.ndim < 2 or values.size <= STRIP_VALUES:
        return function(values)
    rows = max(1, STRIP_VALUES * len(values) // values.size)
    return np.concatenate([function(values[top : top + rows]) for top in range(0, len(values), rows)])


def paint(picture: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """(H, W, 3) uint8 picture with the pixels outside `valid` (H, W) mid-grey."""
    return picture if valid is None else np.where(np.asarray(valid, bool)[..., None], picture, np.uint8(GREY))


def grey_picture(values: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """(H, W) in [0, 1] → (H, W, 3) uint8, black to white."""
    return paint(np.repeat(to_byte(values)[..., None], 3, axis=-1), valid)


def class_palette() -> np.ndarray:
    """(256, 3) uint8 colours of PASCAL VOC: an index's bits dealt in turn to red, green and blue; 255 mid-grey.

    Index 7 (VOC's car) is mid-grey there, the colour of pixels that are not drawn, and blue here.
    """
    index = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            colours[:, channel] |= (((index >> (3 * level + channel)) & 1) << (7 - level)).astype(np.uint8)
    colours[7] = 70, 130, 220
    colours[255] = GREY
    return colours


VIRIDIS = np.array(
    [
        (68, 1, 84),
        (72, 40, 120),
        (62, 74, 137),
        (49, 104, 142),
        (38, 130, 142),
        (31, 158, 137),
        (53, 183, 121),
        (109, 205, 89),
        (180, 222, 44),
        (253, 231, 37),
    ]
)
"""Ten evenly spaced colours of the perceptually uniform map viridis (CC0), dark to bright."""


def colour_map(values: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1] → (H, W, 3) uint8, viridis interpolated linearly."""
    at = np.clip(np.nan_to_num(values), 0, 1) * (len(VIRIDIS) - 1)
    channels = [np.interp(at, np.arange(len(VIRIDIS)), VIRIDIS[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
