"""MATLAB files of version 5 to 7 (`save -v6`, `-v7`), read in plain Python: arrays, texts, cells and structs.

What it gives is what `scipy.io.loadmat` gives for these kinds, whose C code crashes the process on deep nesting and takes any
memory that a few bytes ask for. Objects, functions and sparse matrices are refused; nothing in a file is executed.
"""

from __future__ import annotations

import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pamm import PammError

LARGEST = 2**28
"""Bytes of the variables that are read, unpacked."""

DEEPEST = 16
"""Cells and structs that may lie inside each other; PASCAL-Part has 3."""

MOST = 200_000
"""Arrays in a file, those inside cells and structs counted."""

HEADER = 128
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""Type of stored numbers → NumPy's, without byte order."""
MATRIX, COMPRESSED = 14, 15
TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
CELL, STRUCT, CHARACTERS = 1, 2, 4
NUMERIC = range(6, 16)
OTHERS = {3: "an object", 5: "a sparse matrix", 16: "a function", 17: "an object"}
COMPLEX = 0x08


class MatError(PammError, ValueError):
    """A file that is no MATLAB file of plain arrays; the message says what was found."""


def read_mat(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Variable → value, of those among `names` that the file has.

    Numbers and texts are arrays of two or more dimensions, cells arrays of objects, structs arrays of records, as those of
    `scipy.io.loadmat`. Raises MatError, and OSError for a file that cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise MatError(f"it has more than {LARGEST} bytes")
    if content.startswith(b"MATLAB 7.3") or b"\x89HDF\r\n\x1a\n" in content[:1024]:
        raise MatError("it is of version 7.3 (HDF5); in MATLAB, load it and save it with -v7")
    order = {b"IM": "<", b"MI": ">"}.get(content[126:HEADER])
    if order is None or not content.startswith(b"MATLAB"):
        raise MatError("it is no MATLAB file of version 5 to 7")
    reader = _Reader(order, names)
    try:
        return reader.variables(memoryview(content)[HEADER:])
    except zlib.error as error:
        raise MatError(f"a compressed part is damaged ({error})") from None


class _Reader:
    """Takes a file apart; `left` counts down the bytes and arrays that may still come."""

    def __init__(self, order: str, names: tuple[str, ...]):
        self.order, self.names = order, names
        self.left_bytes, self.left_arrays = LARGEST, MOST

    def variables(self, data: memoryview) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while len(data) >= 8:
            kind, part, data = self.element(data, padded=False)
            if kind == COMPRESSED:
                kind, part, _ = self.element(memoryview(self.unpacked(part)))
            if kind != MATRIX:
                raise MatError(f"an element of type {kind} where a variable should be")
            name, value = self.array(part, 0)
            if name in self.names:
                found[name] = value
        return found

    def unpacked(self, part: memoryview) -> bytes:
        """A compressed part, no larger than the remaining limit; only the name of a variable that is not requested."""
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(part, self.left_bytes + 1)
        if len(content) > self.left_bytes:
            raise MatError(f"it unpacks to more than {LARGEST} bytes")
        self.left_bytes -= len(content)
        return content

    def element(self, data: memoryview, padded: bool = True) -> tuple[int, memoryview, memoryview]:
        """Type and content of the first element, and what follows it."""
        if len(data) < 8:
            raise MatError("it ends inside an element")
        kind, size = (int(n) for n in np.frombuffer(data[:8], f"{self.order}u4"))
        if kind >> 16:  # up to four bytes lie in the tag itself
            size, kind, start, end = kind >> 16, kind & 0xFFFF, 4, 8
            if size > 4:
                raise MatError("a short element is too long")
        else:
            start, end = 8, 8 + size + (-size % 8 if padded else 0)
        if start + size > len(data):
            raise MatError("it ends inside an element")
        return kind, data[start : start + size], data[end:]

    def array(self, data: memoryview, depth: int) -> tuple[str, Any]:
        """Name and value of a matrix element's content."""
        self.left_arrays -= 1
        if self.left_arrays < 0 or depth > DEEPEST:
            raise MatError(f"more than {MOST} arrays, or {DEEPEST} inside each other")
        if not len(data):  # what MATLAB writes for an empty entry of a struct
            return "", np.zeros((0, 0))
        _, flags, data = self.element(data)
        if len(flags) != 8:
            raise MatError("an array without its flags")
        word = int(np.frombuffer(flags[:4], f"{self.order}u4")[0])
        kind, flag = word & 0xFF, word >> 8
        if kind in OTHERS and depth:
            raise MatError(f"it holds {OTHERS[kind]}, expected plain arrays")
        if kind == 17:  # has no size
            return "", None
        code, sizes, data = self.element(data)
        if code != 5 or len(sizes) % 4 or not 8 <= len(sizes) <= 4 * 32:
            raise MatError("an array without its shape")
        shape = tuple(int(n) for n in np.frombuffer(sizes, f"{self.order}i4"))
        _, name, data = self.element(data)
        text = bytes(name).decode("latin-1")
        if min(shape) < 0:
            raise MatError(f"an array of shape {shape}")
        if depth == 0 and text not in self.names:
            return text, None
        if kind in OTHERS:
            raise MatError(f"'{text}' is {OTHERS[kind]}, expected plain arrays")
        if kind in (CELL, STRUCT):
            return text, self.cells(data, shape, depth) if kind == CELL else self.structs(data, shape, depth)
        if kind == CHARACTERS:
            return text, self.characters(data, shape)
        if kind not in NUMERIC or flag & COMPLEX:
            raise MatError(f"an array of kind {kind}{' of complex numbers' if flag & COMPLEX else ''}")
        return text, self.numbers(data, shape)

    def numbers(self, data: memoryview, shape: tuple[int, ...]) -> np.ndarray:
        code, part, _ = self.element(data)
        if code not in NUMBERS or len(part) != prod(shape) * int(NUMBERS[code][1]):
            raise MatError(f"an array of shape {shape} with {len(part)} bytes of type {code}")
        values = np.frombuffer(part, self.order + NUMBERS[code]).reshape(shape, order="F")
        return values.astype(values.dtype.newbyteorder("="))

    def characters(self, data: memoryview, shape: tuple[int, ...]) -> np.ndarray:
        """One text per row, as SciPy gives them."""
        code, part, _ = self.element(data) if len(data) else (16, data, data)
        if code not in TEXTS:
            raise MatError(f"a text of type {code}")
        encoding = TEXTS[code] + {"<": "-le", ">": "-be"}[self.order] * (TEXTS[code] in ("utf-16", "utf-32"))
        try:
            text = bytes(part).decode(encoding)
        except UnicodeDecodeError:
            raise MatError("a text that cannot be decoded") from None
        if len(text) != prod(shape) or len(shape) != 2:
            raise MatError(f"a text of {len(text)} characters and shape {shape}")
        rows = ["".join(text[row :: shape[0]]) for row in range(shape[0])] if text else []
        return np.array(rows, dtype=f"U{max(shape[1], 1)}") if rows else np.array([], dtype="U1")

    def cells(self, data: memoryview, shape: tuple[int, ...], depth: int) -> np.ndarray:
        count = prod(shape)
        if count > len(data) // 8:
            raise MatError(f"a cell array of shape {shape} with {len(data)} bytes")
        values = np.empty(count, object)
        for index in range(count):
            values[index], data = self.entry(data, depth)
        return values.reshape(shape, order="F")

    def structs(self, data: memoryview, shape: tuple[int, ...], depth: int) -> np.ndarray:
        _, length, data = self.element(data)
        width = int(np.frombuffer(length, f"{self.order}i4")[0]) if len(length) == 4 else 0
        _, names, data = self.element(data)
        if width < 1 or len(names) % width:
            raise MatError("a struct without the names of its fields")
        fields = [
            bytes(names[start : start + width]).split(b"\0")[0].decode("latin-1")
            for start in range(0, len(names), width)
        ]
        count = prod(shape)
        if not all(fields) or len(set(fields)) != len(fields):
            raise MatError("a struct with two fields of one name, or one without a name")
        if count * max(len(fields), 1) > max(len(data) // 8, 1):
            raise MatError(f"an array of structs of shape {shape} with {len(data)} bytes")
        values = np.empty(count, [(name, object) for name in fields])
        for index in range(count):
            for name in fields:
                values[index][name], data = self.entry(data, depth)
        return values.reshape(shape, order="F")

    def entry(self, data: memoryview, depth: int) -> tuple[Any, memoryview]:
        """The first array of the content of a cell or struct, and what follows it."""
        kind, part, data = self.element(data)
        if kind != MATRIX:
            raise MatError(f"an element of type {kind} where an array should be")
        return self.array(part, depth + 1)[1], data
