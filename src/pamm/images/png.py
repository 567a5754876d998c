"""A PNG file without its metadata."""

from __future__ import annotations

import io
import os
import struct
import zlib
from bisect import bisect_right
from itertools import accumulate
from typing import BinaryIO

from pamm.images.formats import ImageError

NOTE = "pamm"
"""Keyword of the text chunk in which a label PNG of this library describes its values (`LabelPicture.note`)."""

_MOST_CHUNKS = 1_000_000
_MOST_TEXT = 2**20
"""Bytes of a metadata chunk, packed and unpacked, that is kept; Pillow refuses a picture for more."""

_MOST_UNPACKED = 1032
"""Bytes that one byte of a compressed stream unpacks to, at most."""

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""PNG's colour type → numbers of a pixel."""

_TELLING = {
    (b"eXIf", b""),
    (b"tEXt", b"Raw profile type exif"),
    (b"zTXt", b"Raw profile type exif"),
    (b"iTXt", b"XML:com.adobe.xmp"),
    (b"tEXt", NOTE.encode()),
}
"""Metadata, by chunk and keyword, that describe the orientation or the values."""


def pixels_of_png(file: BinaryIO, most: int) -> _Parts:
    """A PNG without its metadata, which may be large, damaged, or unpack to much more than they take in the file.

    Critical chunks, transparency and the metadata of `_TELLING` stay. Raises ImageError for a million chunks, and for data that
    are too few for the pixels that the header claims, unless these are more than `most`, which the caller refuses.
    """
    parts, at, seen, packed = [(0, 8)], 8, set(), 0
    for _ in range(_MOST_CHUNKS):
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            break
        length, kind = struct.unpack(">I4s", head)
        packed += length if kind == b"IDAT" else 0
        if not kind.isalpha() or not kind[0] & 0x20 or kind == b"tRNS" or _tells(file, kind, length, seen):
            if sum(parts[-1]) == at:
                parts[-1] = parts[-1][0], parts[-1][1] + length + 12
            else:
                parts.append((at, length + 12))
        at += length + 12
        if kind == b"IEND":
            break
    else:
        raise ImageError(
            f"{getattr(file, 'name', 'the image')} has more than {_MOST_CHUNKS:,} chunks. Write the picture again."
        )
    _check_length(file, packed, most)
    return _Parts(file, parts)


def _check_length(file: BinaryIO, packed: int, most: int) -> None:
    """Raise ImageError where `packed` bytes cannot unpack to the pixels that the header claims: Pillow would leave them black."""
    file.seek(8)
    head = file.read(18)
    if len(head) < 18 or head[4:8] != b"IHDR":
        return
    width, height, bits, colour = struct.unpack(">IIBB", head[8:])
    if (
        height * width <= most
        and height * (width * bits * _CHANNELS.get(colour, 1) // 8) > _MOST_UNPACKED * packed + _MOST_UNPACKED
    ):
        raise ImageError(
            f"{getattr(file, 'name', 'the image')} claims {height} x {width} pixels and holds {packed} bytes of them: it is not a "
            "whole picture. Copy or download it again."
        )


def _tells(file: BinaryIO, kind: bytes, length: int, seen: set[object]) -> bool:
    """Whether a metadata chunk is one of `_TELLING`, the first of its kind, and unpacks to a reasonable size."""
    if kind not in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") or length > _MOST_TEXT:
        return False
    keyword, _, rest = (b"", b"", b"") if kind == b"eXIf" else file.read(length).partition(b"\0")
    if (kind, keyword) not in _TELLING or (kind, keyword) in seen:
        return False
    seen.add((kind, keyword))
    if kind == b"zTXt":
        return _unpacks(rest[1:])
    if kind == b"iTXt" and rest[:1] == b"\1":
        return _unpacks(rest[2:].split(b"\0", 2)[-1])
    return True


def _unpacks(packed: bytes) -> bool:
    try:
        return len(zlib.decompressobj().decompress(packed, _MOST_TEXT + 1)) <= _MOST_TEXT
    except zlib.error:
        return False


class _Parts(io.RawIOBase):
    """Parts of a file, each its start and length, as one file."""

    def __init__(self, file: BinaryIO, parts: list[tuple[int, int]]):
        self._file, self._parts, self._at = file, parts, 0
        self._starts = [0, *accumulate(length for _, length in parts)]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._starts[-1])[whence])
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        index = bisect_right(self._starts, self._at) - 1
        if index >= len(self._parts):
            return 0
        start, length = self._parts[index]
        within = self._at - self._starts[index]
        self._file.seek(start + within)
        data = self._file.read(min(len(buffer), length - within))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
