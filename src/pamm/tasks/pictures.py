"""Label files in and out, and the colours of pictures: what the tasks share."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pamm.tasks.task import LabelError

MAX_PIXELS = 100_000_000
"""Pictures with more pixels, images and labels alike, are refused before they are decoded."""

_GLOBALS = threading.Lock()
"""Held while a global of Pillow or of Python's warnings is changed."""

GREY = 128
"""Level of pixels that are not drawn."""


def read_png(path: Path, modes: tuple[str, ...], expected: str) -> np.ndarray:
    """Pixels of a PNG, (H, W) or (H, W, 3); a palette's indices, not its colours.

    modes: the Pillow modes accepted. expected: what the file should hold, for the message.
    Raises LabelError for a file that is absent, empty, damaged, not a PNG, of another mode or implausibly large.
    """
    path = Path(path)
    check_readable(path, f"expected {expected}; write it, or leave the image without this label")
    try:
        with open_picture(path) as image:
            check_png(image, path, modes, expected)
            return np.array(image)
    except LabelError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds; every one means an unreadable file
        size = path.stat().st_size
        raise LabelError(
            f"{path} ({size} bytes) is empty or damaged: reading it as an image ends in {type(error).__name__}: {error}; "
            f"write it again as {expected}"
        ) from None


def check_readable(path: Path, remedy: str) -> None:
    """Raise LabelError unless the file can be opened; the message tells what is in the way."""
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


@contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's warnings, and alone: for what reads or changes a global of Pillow or of Python's warnings."""
    with _GLOBALS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def open_picture(source: str | os.PathLike[str] | BinaryIO) -> Iterator[Image.Image]:
    """Read a picture's header, not its pixels, whatever size it tells; the caller judges the size (`MAX_PIXELS`).

    Pillow's own limit is a global of its module, which warns below its double; it is lifted while the header is parsed,
    in one thread at a time. Raises what Pillow raises.
    """
    with quiet():
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            picture = Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with picture:
        yield picture


def check_png(image: Image.Image, path: Path, modes: tuple[str, ...], expected: str) -> None:
    """Raise LabelError unless `image` is a PNG of one of the modes and of at most `MAX_PIXELS`, by its header."""
    if image.format != "PNG":
        raise LabelError(f"{path} is a {image.format} file, expected {expected}; convert the original label to PNG")
    if image.mode not in modes:
        raise LabelError(
            f"{path} has Pillow mode {image.mode} ({', '.join(image.getbands())}), expected {expected} "
            f"(mode {' or '.join(modes)}); convert the label"
        )
    if image.width * image.height > MAX_PIXELS:
        raise LabelError(
            f"{path} is implausibly large for a label: {image.height} x {image.width} pixels, the limit is "
            f"{MAX_PIXELS:,}; shrink it together with its image"
        )


def read_mask(path: Path) -> Tensor:
    """8-bit or 1-bit grey PNG → (1, H, W) uint8 mask: 1 where the value is above 127. Raises LabelError."""
    expected = "an 8-bit grey PNG, 0 = no, 255 = yes"
    values = read_png(path, ("L", "1"), expected)
    if values.dtype == np.bool_:
        return torch.from_numpy(values.astype(np.uint8))[None]
    if values.max() == 1:
        raise LabelError(f"{path} holds the values 0 and 1 only, expected {expected}; multiply it by 255")
    return torch.from_numpy((values > 127).astype(np.uint8))[None]


def save_grey(probability: np.ndarray, path: Path) -> None:
    """(H, W) in [0, 1] → 8-bit grey PNG, rounded, so that 0.5 and more reads back as 1."""
    Image.fromarray(to_byte(probability)).save(path, format="PNG")


def to_byte(values: np.ndarray) -> np.ndarray:
    """Float array in [0, 1] → uint8 in [0, 255], rounded to nearest; NaN → 0."""
    return np.rint(np.clip(np.nan_to_num(values), 0, 1) * 255).astype(np.uint8)


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
