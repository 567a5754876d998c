"""The formats of pictures that are read, and the detection of a format from a file's first bytes."""

from __future__ import annotations

import codecs
import importlib.util

from PIL import features

from pamm import PammError

HEIF = importlib.util.find_spec("pillow_heif") is not None
"""Whether .heic photographs can be read here."""

FORMATS = tuple(
    name
    for name, there in {
        "JPEG": True,
        "PNG": True,
        "BMP": True,
        "TIFF": True,
        "GIF": True,
        "WEBP": features.check("webp"),
        "AVIF": features.check("avif"),
        "JPEG2000": features.check("jpg_2000"),
        "HEIF": HEIF,
    }.items()
    if there
)
"""Formats of pictures that are read here, by Pillow's names."""

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2",),
    "HEIF": (".heic", ".heif"),
}

IMAGE_SUFFIXES = tuple(suffix for name, suffixes in _SUFFIXES.items() if name in FORMATS for suffix in suffixes)
"""Suffixes of photographs in folders, in lower case."""


class ImageError(PammError, ValueError):
    """A picture that cannot be read; the message names the file, what was found and the remedy."""


HEAD = 64
"""Bytes that identify a format."""

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
}

_FOREIGN = {
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript drawing",
    b"\xc5\xd0\xd3\xc6": "a PostScript drawing",
    b"\xd7\xcd\xc6\x9a": "a WMF drawing",
    b"8BPS": "a Photoshop file",
    b"v/1\x01": "an OpenEXR picture",
    b"#?RADIANCE": "a Radiance picture",
    b"PF": "a portable float map",
    b"Pf": "a portable float map",
    b"P5": "a portable grey map",
    b"P6": "a portable pixel map",
    b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cJXL ": "a JPEG XL picture",
    b"DDS ": "a DirectDraw texture",
    b"\0\0\x01\0": "an icon",
    b"\x93NUMPY": "a NumPy array",
    b"MATLAB": "a MATLAB file",
    b"\x89HDF": "an HDF5 file",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"\0\x05\x16\x07": "a Mac's file of metadata, not the picture it belongs to",
    b"version https://git-lfs": "a Git LFS pointer",
    b"/annex/objects/": "a git-annex pointer",
    b"<": "a web page or a drawing (HTML, SVG)",
    b"{": "a text (JSON)",
}

_REMEDIES = {
    b"PK\x03\x04": "Unpack it, and give the pictures in it.",
    b"\x1f\x8b": "Unpack it, and give the pictures in it.",
    b"\0\x05\x16\x07": "Remove it.",
    b"version https://git-lfs": "Fetch the picture that belongs in its place: git lfs pull.",
    b"/annex/objects/": "Fetch the picture that belongs in its place: git annex get.",
    b"<": "Download the picture again, which a server may have answered with a page; convert a drawing to PNG.",
    b"{": "Download the picture again, which a server may have answered with an error.",
}
"""Remedies for foreign contents that cannot be converted."""

_HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))


def format_of(head: bytes, name: str) -> str:
    """Pillow's name of the format. Raises ImageError where it is none of `FORMATS`."""
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        kind = "WEBP"
    elif head[4:8] == b"ftyp":
        length = int.from_bytes(head[:4], "big")
        brands = {head[at : at + 4] for at in (8, *range(16, min(length, len(head)), 4))}
        kind = "AVIF" if brands & {b"avif", b"avis"} else "HEIF" if brands & _HEIF_BRANDS else None
    if kind in FORMATS:
        return kind
    if kind == "HEIF":
        raise ImageError(
            f"{name} is a HEIF photograph, which needs pillow-heif: pip install 'pamm[heif]', or convert it to JPEG."
        )
    if kind:
        raise ImageError(f"{name} is of format {kind}, which this Pillow was built without. Convert it to PNG or JPEG.")
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    magic = next((magic for magic in _FOREIGN if text.startswith(magic)), None)
    if magic:
        raise ImageError(
            f"{name} is not a picture of a format that is read here ({', '.join(FORMATS)}) but {_FOREIGN[magic]}. "
            f"{_REMEDIES.get(magic, 'Convert it to PNG or JPEG.')}"
        )
    raise ValueError("its content is of no known format")
