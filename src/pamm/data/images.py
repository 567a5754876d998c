"""Safe reading of picture files: photographs as 8-bit RGB, label maps as their raw values."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from pamm.tasks.pictures import MAX_PIXELS, open_picture, quiet

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""File names that data folders take for photographs."""

_NO_FILE = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Of the system's errors, those that a path causes, not the content of its file."""


class ImageError(ValueError):
    """A picture that cannot be read; the message names the file, what was found and the remedy."""


def read_image(
    source: str | os.PathLike[str] | BinaryIO, *, exif: bool = True, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Photograph → (H, W, 3) uint8 RGB.

    Grey is repeated to three channels, 16-bit grey is scaled to 8 bits, transparency is laid over white, palettes and
    CMYK are converted; of an animation the first frame is read. `exif` turns the picture as its EXIF orientation says,
    which is how every viewer shows it. Raises ImageError for anything that is not a whole picture of at most `max_pixels`.
    """
    with _decoding(source), _opened(source, max_pixels) as picture:
        picture.load()
        turned = _turn(picture) if exif else picture
        return np.array(to_rgb(turned, _name(source)))


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) of a picture as stored, from its header alone. Raises ImageError."""
    with _decoding(path), _opened(path, None) as picture:
        return picture.height, picture.width


def read_values(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Label picture → its stored values, (H, W) or (H, W, channels), palette indices as such. Raises ImageError."""
    with _decoding(path), _opened(path, max_pixels) as picture:
        return np.array(picture)


def _name(source: str | os.PathLike[str] | BinaryIO) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return str(getattr(source, "name", "the image"))


@contextmanager
def _opened(source: str | os.PathLike[str] | BinaryIO, max_pixels: int | None) -> Iterator[Image.Image]:
    """The picture with its header read; one with more than `max_pixels` is refused."""
    with open_picture(source) as picture:
        pixels = picture.width * picture.height
        if max_pixels is not None and pixels > max_pixels:
            raise ImageError(
                f"{_name(source)} has {picture.height} x {picture.width} = {pixels:,} pixels; the limit is "
                f"{max_pixels:,}. Shrink or tile the picture, or pass a larger max_pixels."
            )
        yield picture


def _turn(picture: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; Pillow warns of damaged EXIF data, without which the picture is still whole."""
    with quiet():
        return ImageOps.exif_transpose(picture)


@contextmanager
def _decoding(source: str | os.PathLike[str] | BinaryIO) -> Iterator[None]:
    """Whatever a decoder raises on damaged bytes becomes an ImageError that names the file."""
    name = _name(source)
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        if os.path.islink(name):
            raise ImageError(
                f"{name} is a broken link to {os.readlink(name)}. Restore that file, or remove the link."
            ) from None
        raise ImageError(f"no file {name}. Check the path, or copy the file there again.") from None
    except MemoryError:
        raise ImageError(f"{name} does not fit into memory. Shrink or tile the picture.") from None
    except PermissionError:
        raise ImageError(f"{name} may not be read: change the permissions of the file or of its folder.") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_FILE:
            raise ImageError(f"{name} cannot be opened: {error.strerror}. Give the path of a picture file.") from None
        if isinstance(source, (str, os.PathLike)) and os.path.isfile(source) and os.path.getsize(source) == 0:
            raise ImageError(f"{name} is empty (0 bytes). Copy or download it again.") from None
        raise ImageError(
            f"{name} is not a whole picture ({error}). Copy or download it again, or convert it to PNG or JPEG."
        ) from None


def to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{name} has values from {values.min()} to {values.max()}, expected 8 or 16 bits. Convert it to RGB."
            )
        picture = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if picture.mode == "F":
        raise ImageError(f"{name} holds floating point values of unknown range. Convert it to 8-bit RGB.")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
