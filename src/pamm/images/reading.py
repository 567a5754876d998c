"""Photographs as 8-bit RGB, label pictures as the values that their files store."""

from __future__ import annotations

import errno
import importlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from pamm import PammError
from pamm.images.formats import HEAD, ImageError, format_of
from pamm.images.png import NOTE, pixels_of_png

MAX_PIXELS = 250_000_000
"""Pictures with more pixels, images and labels alike, are refused before they are decoded."""

_MOST_PIXELS = {"JPEG2000": 100_000_000, "WEBP": 150_000_000, "AVIF": 150_000_000, "HEIF": 150_000_000}
"""The same for formats whose decoders take several times as much memory, 11 to 23 bytes per pixel."""

_GLOBALS = threading.Lock()
"""Held while a global of Pillow or of Python's warnings is changed."""

_NO_FILE = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Of the system's errors, those that a path causes, not the content of its file."""

_STRIP_PIXELS = 2**22
"""Number of pixels that are converted at once. It limits the memory beside a large picture."""

_KINDS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey and alpha", 6: "RGBA"}
"""PNG's colour types."""

Source = str | os.PathLike[str] | BinaryIO


def read_image(source: Source, *, exif: bool = True, max_pixels: int | None = None) -> np.ndarray:
    """Read a photograph as RGB.

    - Grey is repeated to three channels, 16 bits are scaled to 8, transparency is laid over white, palettes and CMYK are
      converted. Colour profiles are not applied.
    - The first frame of an animation is read.
    - Memory: 7 bytes per pixel; 11 to 23 for WebP, AVIF, HEIF and JPEG 2000.

    Args:
        source: a path or an open file.
        exif: turn the picture as its EXIF orientation says, as viewers do. Pillow always turns `.heic` and `.tif`.
        max_pixels: largest number of pixels; by default `MAX_PIXELS`, and fewer for WebP, AVIF, HEIF and JPEG 2000.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ImageError: not a complete picture, or too large.
    """
    with decoding(source):
        return np.ascontiguousarray(_read(source, exif, max_pixels))  # turned when Pillow's copy is gone


def _read(source: Source, exif: bool, max_pixels: int | None) -> np.ndarray:
    with open_picture(source) as picture:
        _check_size(picture, name_of(source), max_pixels)
        return _rgb(picture, name_of(source), exif)


def image_size(path: Path) -> tuple[int, int]:
    """Size of a picture as stored (`.heic` and `.tif`: as shown). Only the header is read.

    Args:
        path: the file.

    Returns:
        (H, W).

    Raises:
        ImageError: the file is not a readable picture.
    """
    with decoding(path), open_picture(path) as picture:
        return picture.height, picture.width


def image_orientation(path: Path) -> int:
    """EXIF orientation of a picture.

    Args:
        path: the file.

    Returns:
        1 to 8; 1 if the file has none.

    Raises:
        ImageError: the file is not a readable picture.
    """
    with decoding(path), open_picture(path) as picture:
        return _orientation(picture)


def read_values(path: Path, *, max_pixels: int | None = None) -> np.ndarray:
    """Read a label PNG.

    Args:
        path: the file.
        max_pixels: largest number of pixels; by default `MAX_PIXELS`.

    Returns:
        (H, W) or (H, W, channels) stored values, see `LabelPicture.values`.

    Raises:
        ImageError: not a complete PNG, or too large.
    """
    with open_label(path) as label:
        _check_size(label.picture, name_of(path), max_pixels)
        return label.values()


class LabelPicture:
    """A label PNG whose header has been read.

    Attributes:
        kind: "grey", "palette", "grey and alpha", "RGB" or "RGBA".
        bits: bits of one value, 1, 2, 4, 8 or 16.
        note: text that this library wrote into the file about its values, else "".

    Args:
        path: the file, for messages.
        picture: the opened picture.
        header: first bytes of the file.
    """

    def __init__(self, path: Path, picture: Image.Image, header: bytes):
        self.path, self.picture = path, picture
        self.bits, self.kind = header[24], _KINDS.get(header[25], "unknown")
        self.height, self.width = picture.height, picture.width
        self.note = str(picture.info.get(NOTE, ""))

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.kind}"

    def values(self) -> np.ndarray:
        """The values as stored: palette indices and not colours; grey of 1, 2 and 4 bits gives 0 to 1, 3 and 15.

        Returns:
            (H, W) or (H, W, channels) uint8, or uint16 for 16 bits.

        Raises:
            ImageError: colours of 16 bits, of which Pillow keeps only 8.
        """
        if self.bits == 16 and self.kind != "grey":
            raise ImageError(
                f"{self.path} holds {self} values, of which 8 bits would be lost. Convert the label to 8 bits per channel."
            )
        values = np.array(self.picture)
        if self.bits == 16:
            return values.astype(np.uint16)
        if values.dtype == np.bool_:
            return values.astype(np.uint8)
        return values // np.uint8(255 // (2**self.bits - 1)) if self.kind == "grey" else values


@contextmanager
def open_label(path: Path) -> Iterator[LabelPicture]:
    """Context manager: open a label PNG and read its header. The caller checks kind and size.

    Args:
        path: the file.

    Yields:
        The label picture.

    Raises:
        ImageError: the file is not a PNG.
    """
    with decoding(path), open_picture(path) as picture:
        if picture.format != "PNG":
            raise ImageError(f"{path} is a {picture.format} file, expected a PNG. Convert the original label to PNG.")
        with open(path, "rb") as file:
            header = file.read(26)
        yield LabelPicture(path, picture, header)


def to_rgb(picture: Image.Image, name: str, *, exif: bool = True) -> np.ndarray:
    """Convert a Pillow picture to RGB, as `read_image` does.

    Args:
        picture: the picture.
        name: its name, for messages.
        exif: turn the picture as its EXIF orientation says.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ImageError: the range of the values is not known.
    """
    return np.ascontiguousarray(_rgb(picture, name, exif))


def _rgb(picture: Image.Image, name: str, exif: bool) -> np.ndarray:
    picture.load()
    if picture.mode == "F":
        raise ImageError(f"{name} holds floating point values of unknown range. Convert it to 8-bit RGB.")
    if picture.mode == "I":
        low, high = cast("tuple[float, float]", picture.getextrema())  # of one channel
        if low < 0 or high > 65535:
            raise ImageError(f"{name} has values from {low} to {high}, expected 8 or 16 bits. Convert it to RGB.")
    if picture.mode.startswith("I") and _is_negative(picture):
        raise ImageError(
            f"{name} stores white as 0, which is only supported for 8 bits. Convert it to 8-bit grey or RGB."
        )
    height, width = picture.height, picture.width
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(_rgb_strip(picture.crop((0, top, width, bottom))))
    return _turned(pixels, _orientation(picture) if exif else 1)


def _is_negative(picture: Image.Image) -> bool:
    """Whether a TIFF's values grow from white to black, which Pillow turns round for up to 8 bits."""
    return getattr(picture, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _rgb_strip(strip: Image.Image) -> Image.Image:
    if strip.mode.startswith("I"):
        values = np.asarray(strip)
        grey = np.round(values / 257).astype(np.uint8)
        grey[values == strip.info.get("transparency", -1)] = 255
        strip = Image.fromarray(grey)
    if strip.has_transparency_data:
        strip = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, (255, 255, 255, 255)), strip)
    return strip.convert("RGB")


def _orientation(picture: Image.Image) -> int:
    """1 if the EXIF data have none or are damaged: the picture itself is whole without them."""
    with quiet():
        try:
            found = picture.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # Pillow's parsers of metadata raise many kinds
            return 1
    return found if found in range(1, 9) else 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3) as stored → as shown, a view."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def name_of(source: Source) -> str:
    """The name of a picture in messages."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return str(getattr(source, "name", "the image"))


def _check_size(picture: Image.Image, name: str, most: int | None) -> None:
    pixels = picture.width * picture.height
    if most is None:
        most = _MOST_PIXELS.get(picture.format or "", MAX_PIXELS)
    if pixels > most:
        raise ImageError(
            f"{name} has {picture.height} x {picture.width} = {pixels:,} pixels; the limit is {most:,}. Shrink the "
            "picture, or cut it into tiles."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager for code that reads or changes a global of Pillow or of Python's warnings: Pillow's warnings are off.

    Only one thread at a time can be inside.

    Yields:
        Nothing.
    """
    with _GLOBALS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def open_picture(source: Source) -> Iterator[Image.Image]:
    """Context manager: read a picture's header, but not its pixels. The caller checks the size (`MAX_PIXELS`).

    Pillow's own size limit is a global of its module. It is lifted while the header is parsed, in one thread at a time.

    Args:
        source: a path or an open file.

    Yields:
        The picture.

    Raises:
        ImageError: the content has none of `FORMATS`. Errors of Pillow pass through; see `decoding`.
    """
    with ExitStack() as stack:
        file = stack.enter_context(_open_file(source)) if isinstance(source, (str, os.PathLike)) else source
        try:
            file.seek(0)
        except (AttributeError, io.UnsupportedOperation):
            file = io.BytesIO(file.read())
        kind = format_of(file.read(HEAD), name_of(source))
        content = io.BufferedReader(pixels_of_png(file, MAX_PIXELS)) if kind == "PNG" else file
        with quiet():
            if kind == "HEIF":
                importlib.import_module("pillow_heif").register_heif_opener()
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                picture = Image.open(content, formats=[kind])
            except UnidentifiedImageError:
                raise ValueError(f"its {kind} header cannot be read") from None
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        yield stack.enter_context(picture)


def _open_file(path: str | os.PathLike[str]) -> BinaryIO:
    if not stat.S_ISREG(kind := os.stat(path).st_mode) and not stat.S_ISDIR(kind):  # reading a pipe may wait for ever
        raise ImageError(f"{os.fspath(path)} is a device or a pipe. Give the path of a picture file.")
    return open(path, "rb")


@contextmanager
def decoding(source: Source) -> Iterator[None]:
    """Context manager: an error of a decoder on damaged bytes becomes an ImageError that names the file.

    Args:
        source: the file.

    Yields:
        Nothing.

    Raises:
        ImageError: the picture is damaged.
    """
    name = name_of(source)
    try:
        yield
    except PammError:  # a judgement on the picture by who opened it
        raise
    except FileNotFoundError:
        if os.path.islink(name):
            raise ImageError(
                f"{name} is a broken link to {os.readlink(name)}. Restore that file, or remove the link."
            ) from None
        raise ImageError(f"no file {name}. Check the path, or copy the file there again.") from None
    except MemoryError:
        raise ImageError(f"{name} does not fit into memory. Shrink the picture, or cut it into tiles.") from None
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
