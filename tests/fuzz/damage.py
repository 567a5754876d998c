"""Strategies that damage what is sound: bytes, trees of settings, and files whose parts carry checksums."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from scipy.io import savemat

NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
PIECES = (
    b"",
    b"\0",
    b"\xff" * 8,
    b"[" * 3000,
    b"{" * 3000,
    b"9" * 400,
    b"\x1b[31m",
    b"../../x",
    b"\n",
    b"*a",
    b"NaN",
    b"1e999",
)

TEXTS = ("", "../../x", "/etc/passwd", "\x1b[31m", "a" * 5000, "é", "nan", "-inf", "1e999", "none", "true")
WHOLE = (-1, 0, 1, 2, 3, 7, 33, 4097, 2**31, 2**63 - 1, 2**63, 10**30)
leaves = st.one_of(
    *(st.none(), st.booleans(), st.sampled_from(WHOLE), st.integers(-10, 300)),
    *(
        st.sampled_from((float("nan"), float("inf"), -0.5, 1e-300, 1e300)),
        st.floats(),
        st.sampled_from(TEXTS),
        st.text(max_size=8),
    ),
)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with some bytes changed, cut off, put in, repeated or replaced by a number."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("bit", "number", "piece", "cut", "repeat", "remove")))
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        if kind == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            order = draw(st.sampled_from("<>"))
            data[at : at + 4] = struct.pack(f"{order}I", draw(st.sampled_from(NUMBERS)))
        elif kind == "piece":
            data[at:at] = draw(st.sampled_from(PIECES) | st.binary(max_size=12))
        elif kind == "cut":
            del data[at:]
        elif kind == "repeat":
            data[at:at] = bytes(data[at : at + draw(st.integers(1, 64))]) * draw(st.integers(1, 40))
        else:
            del data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A tree of mappings and lists with a value replaced, removed or added."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(tree)))
        rest = {name: value for name, value in tree.items() if name != key}
        action = draw(st.integers(0, 9))
        if action == 0:
            return rest
        if action == 1:
            return tree | {draw(st.text(max_size=6)): draw(trees)}
        return {name: draw(changed(value)) if name == key else value for name, value in tree.items()}
    if isinstance(tree, list) and tree and draw(st.integers(0, 5)):
        at = draw(st.integers(0, len(tree) - 1))
        return [*tree[:at], draw(changed(tree[at])), *tree[at + 1 :]]
    return draw(trees)


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def in_text(content: bytes, load: Callable[[str], Any], dump: Callable[[Any], bytes]) -> st.SearchStrategy[bytes]:
    """A text of settings, changed as a tree or as bytes."""
    return changed(load(content.decode())).map(dump) | damaged(content)


@st.composite
def in_zip(draw: st.DrawFn, content: bytes) -> bytes:
    """An archive with one record damaged, and its checksum right again; sometimes compressed, or with a record twice."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = draw(st.sampled_from([n for n in records if n.endswith("data.pkl")] * 3 + sorted(records)))
    records[name] = draw(damaged(records[name]))
    kind = draw(st.sampled_from((zipfile.ZIP_STORED,) * 5 + (zipfile.ZIP_DEFLATED,)))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", kind) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return made.getvalue()


@st.composite
def in_png(draw: st.DrawFn, content: bytes) -> bytes:
    """A PNG with one chunk damaged, and its checksum and length right again."""
    chunks, rest = [], content[8:]
    while len(rest) >= 12:
        size = int.from_bytes(rest[:4], "big")
        chunks.append((rest[4:8], rest[8 : 8 + size]))
        rest = rest[12 + size :]
    at = draw(st.integers(0, len(chunks) - 1))
    chunks[at] = (chunks[at][0], draw(damaged(chunks[at][1])))
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return content[:8] + b"".join(parts)


@st.composite
def in_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with its table of names and shapes changed."""
    size = int.from_bytes(content[:8], "little")
    header = draw(changed(json.loads(content[8 : 8 + size])).map(as_json) | damaged(content[8 : 8 + size]))
    return draw(st.just(len(header)) | st.sampled_from(NUMBERS)).to_bytes(8, "little") + header + content[8 + size :]


@st.composite
def in_mat(draw: st.DrawFn, content: bytes) -> bytes:
    """A MATLAB file with its elements damaged, then compressed or not."""
    body = draw(damaged(content[128:]))
    if draw(st.booleans()):
        packed = zlib.compress(body)
        body = struct.pack("<II", 15, len(packed)) + packed
    return content[:128] + body


nested = st.recursive(
    st.sampled_from(
        (np.eye(3), np.zeros((0, 0)), np.uint8(3), "text", "", np.arange(6).reshape(1, 2, 3), np.array(1 + 2j))
    ),
    lambda inner: (
        st.dictionaries(st.sampled_from("abcd"), inner, min_size=1)
        | st.lists(inner, max_size=3).map(lambda items: np.array([*items, None], dtype=object)[:-1])
    ),
    max_leaves=8,
)


@st.composite
def mat_of(draw: st.DrawFn, name: str) -> bytes:
    """A sound MATLAB file whose variable `name` has any structure."""
    made = io.BytesIO()
    savemat(made, {name: draw(nested)}, do_compression=draw(st.booleans()))
    return made.getvalue()


@st.composite
def in_npy(draw: st.DrawFn, content: bytes) -> bytes:
    """An array file with another header: type, order and shape of any kind."""
    kind = draw(st.sampled_from(("<f4", "<f8", ">f2", "|O", "<U4", "<c16", "|V8", "<i8", [("a", "<f4")], "", "x")))
    sides = st.sampled_from((0, 1, 2, 3, 4, -1, 2**31, 2**63, 10**30, 2.5, "4", None))
    shape = draw(st.lists(sides, max_size=4).map(tuple) | st.sampled_from((12, None, "(3, 4)")))
    header = (
        repr({"descr": kind, "fortran_order": draw(st.sampled_from((True, False, 3))), "shape": shape}).encode() + b"\n"
    )
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content[-96:]
