"""PNG files written by the book, of bits, colours and metadata that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row, first column, and their steps, of the seven passes of an interlaced picture."""


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    path: Path,
    values: np.ndarray,
    *,
    bits: int = 8,
    colour: int = GREY,
    interlaced: bool = False,
    before: Iterable[tuple[bytes, bytes]] = (),
    after: Iterable[tuple[bytes, bytes]] = (),
) -> Path:
    """Write (H, W) or (H, W, channels) whole numbers below 2**bits; metadata chunks before and after the pixels."""
    values = np.asarray(values).reshape(*np.shape(values)[:2], CHANNELS[colour])
    height, width = values.shape[:2]
    passes = [values[r::dr, c::dc] for r, c, dr, dc in ADAM7] if interlaced else [values]
    rows = b"".join(b"\0" + packed(row, bits) for part in passes if part.size for row in part)
    palette = [(b"PLTE", bytes(3 * k % 256 for k in range(3 * 2**bits)))] if colour == PALETTE else []
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced))
    body = [(b"IHDR", header), *palette, *before, (b"IDAT", zlib.compress(rows)), *after, (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in body))
    return path


def packed(row: np.ndarray, bits: int) -> bytes:
    """(W, channels) values of a row, the first in the highest bits."""
    flat = row.reshape(-1)
    if bits == 16:
        return flat.astype(">u2").tobytes()
    each = (flat[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(each.reshape(-1).astype(np.uint8)).tobytes()
