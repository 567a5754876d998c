"""Photographs of every format and kind of pixel that is read, and the refusal of those that are not."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from data.png_files import GREY_ALPHA, RGB, RGBA, chunk, png
from pamm.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    ImageError,
    image_orientation,
    image_size,
    read_image,
    to_rgb,
)
from pamm.tasks import LabelError, create_task

RNG = np.random.default_rng(0)
SMOOTH = np.stack(np.meshgrid(np.linspace(30, 200, 48), np.linspace(10, 240, 32)), -1)
SMOOTH = np.concatenate([SMOOTH, SMOOTH.mean(-1, keepdims=True)], -1).astype(np.uint8)
"""(32, 48, 3), which any compression keeps nearly."""

WRITTEN = {
    ".jpg": {"format": "JPEG", "quality": 95},
    ".jpeg": {"format": "JPEG", "quality": 95, "progressive": True},
    ".jfif": {"format": "JPEG", "quality": 95},
    ".png": {"format": "PNG"},
    ".bmp": {"format": "BMP"},
    ".tif": {"format": "TIFF"},
    ".tiff": {"format": "TIFF", "compression": "tiff_lzw"},
    ".webp": {"format": "WEBP", "lossless": True},
    ".gif": {"format": "GIF"},
    ".avif": {"format": "AVIF", "quality": 95},
    ".jp2": {"format": "JPEG2000"},
    ".heic": {"format": "HEIF", "quality": 95},
    ".heif": {"format": "HEIF", "quality": 95},
}


def write(path, picture=None, **options):
    if options.get("format") == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    (picture or Image.fromarray(SMOOTH)).save(path, **options)
    return path


def readable(suffix):
    return pytest.mark.skipif(suffix not in IMAGE_SUFFIXES, reason="this Pillow was built without it")


def each(suffixes):
    return [pytest.param(suffix, marks=readable(suffix)) for suffix in suffixes]


@pytest.mark.parametrize("suffix", each(WRITTEN))
def test_every_format_is_read_by_its_content(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", **WRITTEN[suffix])
    image = read_image(path)
    assert image.shape == SMOOTH.shape and image.dtype == np.uint8
    assert np.abs(image.astype(int) - SMOOTH).max() <= (24 if suffix == ".gif" else 12)
    assert image_size(path) == SMOOTH.shape[:2] and image_orientation(path) == 1
    other = path.rename(tmp_path / f"b{'.png' if suffix != '.png' else '.jpg'}")
    np.testing.assert_array_equal(read_image(other), image)
    np.testing.assert_array_equal(read_image(io.BytesIO(other.read_bytes())), image)


def test_what_is_read_here_is_what_is_listed():
    built = {".webp": features.check("webp"), ".avif": features.check("avif"), ".jp2": features.check("jpg_2000")}
    heif = importlib.util.find_spec("pillow_heif") is not None
    for suffix in WRITTEN:
        there = built.get(suffix, heif if suffix in (".heic", ".heif") else True)
        assert (suffix in IMAGE_SUFFIXES) == there
    assert not {"EPS", "WMF", "PSD", "FITS", "ICNS"} & set(FORMATS)


@pytest.mark.parametrize("suffix", each([".heic"]))
def test_without_pillow_heif_a_photograph_is_told_with_the_remedy(tmp_path, suffix):
    path = write(tmp_path / "a.heic", **WRITTEN[suffix])
    code = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'pillow_heif' else find(name, *rest); "
        "sys.modules['pillow_heif'] = None; from pamm import images; "
        "assert '.heic' not in images.IMAGE_SUFFIXES; "
        f"images.read_image({str(path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImageError" in done.stderr and "pip install 'pamm[heif]'" in done.stderr


def test_heif_is_not_loaded_before_a_photograph_needs_it(tmp_path):
    path = write(tmp_path / "a.png", format="PNG")
    code = f"import sys; from pamm.images import read_image; read_image({str(path)!r}); sys.exit('pillow_heif' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- content that is no picture of these ----------------------------------------------------------------------------------

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n"
FOREIGN = {
    "PostScript": POSTSCRIPT,
    "PostScript with a preview": b"\xc5\xd0\xd3\xc6" + bytes(28) + POSTSCRIPT,
    "PDF": b"%PDF-1.7\n1 0 obj\n",
    "WMF": b"\xd7\xcd\xc6\x9a\0\0\0\0\0\0\x64\0\x64\0\x48\0" + bytes(60),
    "Photoshop": b"8BPS\0\1" + bytes(40),
    "OpenEXR": b"v/1\x01\2\0\0\0" + bytes(60),
    "portable float map": b"PF\n4 3\n-1.0\n" + bytes(144),
    "JPEG XL": b"\xff\x0a" + bytes(40),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(40),
    "ZIP": b"PK\x03\x04" + bytes(40),
    "metadata": b"\0\5\x16\7\0\2\0\0Mac OS X        ",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "git annex get": b"/annex/objects/SHA256E-s3--0.png\n",
    "web page": b"\xef\xbb\xbf\n<!DOCTYPE html><html><body>404</body></html>",
    "JSON": b'{"message": "not found"}',
}
REMEDIES = {
    "ZIP": "Unpack it",
    "metadata": "Remove it",
    "git lfs pull": "Fetch the picture .*: git lfs pull",
    "git annex get": "Fetch the picture .*: git annex get",
    "web page": "Download the picture again",
    "JSON": "Download the picture again",
}
"""What is to be done about content that cannot be converted."""


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_content_is_refused_whatever_its_name_says(tmp_path, kind):
    for suffix in (".png", ".jpg", ".tif"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(FOREIGN[kind])
        for read in (read_image, image_size):
            with pytest.raises(
                ImageError, match=rf"a\{suffix} is not a picture of a format .*{kind.split()[0]}"
            ) as told:
                read(path)
            assert re.search(REMEDIES.get(kind, "Convert it to PNG or JPEG"), str(told.value))
            assert ("Convert it" in str(told.value)) == (kind not in REMEDIES)
    for name in ("semseg", "depth", "normals", "sal", "edge"):
        with pytest.raises(LabelError, match=r"a\.png is not a picture of a format that is read here"):
            create_task(name).read(tmp_path / "a.png")


@pytest.mark.skipif(os.name == "nt", reason="a program in the search path, by its name")
def test_no_program_is_started_for_a_drawing(tmp_path):
    """Pillow would give a `.png` that is PostScript to Ghostscript."""
    trap = tmp_path / "bin" / "gs"
    trap.parent.mkdir()
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    trap.chmod(0o755)
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    code = f"from pamm.images import read_image; read_image({str(tmp_path / 'a.png')!r})"
    path = {"PATH": f"{trap.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **path}, capture_output=True, text=True, check=False
    )
    assert "ImageError" in done.stderr and not (tmp_path / "started").exists()


def test_a_pipe_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=r"a\.png is a device or a pipe"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", each([".jpg", ".gif", ".bmp", ".tif", ".webp", ".avif", ".jp2"]))
def test_labels_are_png_whatever_their_name_says(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", Image.fromarray(SMOOTH[..., 0]), **WRITTEN[suffix]).rename(tmp_path / "a.png")
    with pytest.raises(LabelError, match=r"a\.png is a \w+ file, expected a PNG"):
        create_task("semseg").read(path)


@pytest.mark.parametrize("suffix", each([".jp2"]))
def test_a_small_file_that_claims_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, suffix):
    path = write(tmp_path / "a.jp2", **WRITTEN[suffix])
    content, side = bytearray(path.read_bytes()), struct.pack(">II", 15_000, 15_000)
    at = content.index(b"ihdr")
    content[at + 4 : at + 12] = side
    at = content.index(b"\xff\x51")
    content[at + 6 : at + 14] = content[at + 22 : at + 30] = side
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"has 15000 x 15000 = 225,000,000 pixels; the limit is 100,000,000\. Shrink"):
        read_image(path)


# -- kinds of pixels -------------------------------------------------------------------------------------------------------


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.fromarray(np.full((8, 9, 3), level, np.uint8)) for level in (40, 90, 200)]
    for suffix, options in {".gif": {}, ".webp": {"lossless": True}, ".png": {"format": "PNG"}, ".tif": {}}.items():
        if suffix in IMAGE_SUFFIXES:
            path = tmp_path / f"a{suffix}"
            frames[0].save(path, save_all=True, append_images=frames[1:], **options)
            assert np.unique(read_image(path)).tolist() == [40], suffix


@pytest.mark.parametrize("colour", [RGB, RGBA, GREY_ALPHA])
def test_sixteen_bits_a_channel_become_eight(tmp_path, colour):
    channels = {RGB: 3, RGBA: 4, GREY_ALPHA: 2}[colour]
    values = RNG.integers(0, 65536, (9, 11, channels))
    values[..., -1] = 65535 if colour != RGB else values[..., -1]
    image = read_image(png(tmp_path / "a.png", values, bits=16, colour=colour))
    shown = values[..., :3] if channels >= 3 else values[..., :1]
    assert np.abs(image - shown / 257).max() <= 1


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_of_grey_in_either_byte_order_become_eight(tmp_path, order):
    """Fiji and ImageJ write the highest byte first."""
    values = RNG.integers(0, 65536, (9, 11))
    path = write(tmp_path / "a.tif", Image.fromarray(values.astype(f"{order}u2")))
    assert path.read_bytes()[:2] == {"<": b"II", ">": b"MM"}[order]
    np.testing.assert_array_equal(read_image(path), np.round(values / 257)[..., None].repeat(3, -1))


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_whose_white_is_0_is_turned_round_or_refused(tmp_path, bits):
    values = RNG.integers(0, 2**bits, (9, 11)).astype(f"<u{bits // 8}")
    path = write(tmp_path / "a.tif", Image.fromarray(values))
    black, white = (struct.pack("<HHIHH", 262, 3, 1, photometric, 0) for photometric in (1, 0))
    assert path.read_bytes().count(black) == 1
    path.write_bytes(path.read_bytes().replace(black, white))
    if bits == 8:
        np.testing.assert_array_equal(read_image(path)[..., 0], 255 - values)
    else:
        with pytest.raises(ImageError, match=r"a\.tif stores white as 0.*Convert it to 8-bit grey"):
            read_image(path)


def test_a_level_of_sixteen_bits_that_is_transparent_is_white(tmp_path):
    values = RNG.integers(0, 65536, (9, 11))
    path = png(tmp_path / "a.png", values, bits=16, before=[(b"tRNS", struct.pack(">H", values[2, 3]))])
    expected = np.round(values / 257)
    expected[values == values[2, 3]] = 255
    np.testing.assert_array_equal(read_image(path)[..., 0], expected)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_palette_with_transparency_is_laid_over_white(tmp_path, suffix):
    if suffix == ".tif":
        pixels = np.zeros((4, 4, 4), np.uint8)
        pixels[:, :2] = 10, 20, 30, 255
        path = write(tmp_path / "a.tif", Image.fromarray(pixels))
    else:
        picture = Image.fromarray(np.array([[0, 0, 1, 1]] * 4, np.uint8))
        picture.putpalette([10, 20, 30, 200, 100, 50] + [0] * 762)
        path = write(tmp_path / "a.png", picture, transparency=1)
    image = read_image(path)
    assert (image[:, :2] == (10, 20, 30)).all() and (image[:, 2:] == 255).all()


def test_inks_become_colours(tmp_path):
    inks = Image.new("CMYK", (9, 8), (255, 0, 255, 0))
    for suffix in (".jpg", ".tif"):
        image = read_image(write(tmp_path / f"a{suffix}", inks))
        np.testing.assert_allclose(image, np.broadcast_to((0, 255, 0), (8, 9, 3)), atol=4)


def test_bits_below_eight_are_levels_of_grey(tmp_path):
    for bits in (1, 2, 4):
        values = RNG.integers(0, 2**bits, (9, 11))
        image = read_image(png(tmp_path / "a.png", values, bits=bits))
        np.testing.assert_array_equal(image[..., 0], values * 255 // (2**bits - 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", each([".jpg", ".png", ".tif", ".webp", ".avif"]))
def test_every_orientation_is_undone(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path / f"a{suffix}", exif=exif, **WRITTEN[suffix])
    with Image.open(path) as opened:
        expected = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
        np.testing.assert_array_equal(to_rgb(opened, "a"), expected)
    np.testing.assert_array_equal(read_image(path), expected)
    assert expected.shape[:2] == ((48, 32) if orientation >= 5 else (32, 48))
    assert image_orientation(path) == orientation
    if suffix == ".tif":  # Pillow turns it in any case
        return
    stored = read_image(path, exif=False)
    assert stored.shape == SMOOTH.shape and np.abs(stored.astype(int) - SMOOTH).max() <= 12


def test_large_metadata_of_other_formats_are_no_reason_to_refuse(tmp_path):
    profile, exif = RNG.bytes(3_000_000), Image.Exif()
    exif[0x010E] = "x" * 60_000
    for suffix in (".jpg", ".webp", ".tif", ".avif"):
        if suffix in IMAGE_SUFFIXES:
            path = write(tmp_path / f"a{suffix}", icc_profile=profile, exif=exif, **WRITTEN[suffix])
            assert path.stat().st_size > 3_000_000
            assert np.abs(read_image(path).astype(int) - SMOOTH).max() <= 12


def test_a_damaged_orientation_leaves_the_picture_as_stored(tmp_path):
    for body in (
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x63\0\0\0\0\0\0\0",
        b"x",
    ):
        path = write(tmp_path / "a.jpg", exif=body, **WRITTEN[".jpg"])
        assert read_image(path).shape == SMOOTH.shape


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of memory is told there")
def test_a_photograph_of_108_megapixels_is_read_in_the_memory_it_needs(tmp_path):
    width, height = 12_000, 9_000
    packer, rows = zlib.compressobj(1), bytes(100 * (3 * width + 1))
    pixels = b"".join(packer.compress(rows) for _ in range(height // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, RGB, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    code = (
        "import re; from pamm.images import read_image; "
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); "
        f"before = peak(); shape = read_image({str(tmp_path / 'a.png')!r}).shape; print(*shape, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *shape, kilobytes = map(int, done.stdout.split())
    assert shape == [height, width, 3]
    assert 3 * width * height < 1024 * kilobytes < 9 * width * height


def test_a_png_that_claims_more_than_its_data_can_hold_is_refused(tmp_path):
    """Pillow takes the end of the data for the end of the picture, and leaves the rest black."""
    whole = tmp_path / "whole.png"
    Image.new("RGB", (2000, 1500)).save(whole)  # one colour: as much as can be packed
    assert read_image(whole).shape == (1500, 2000, 3)
    content = bytearray(whole.read_bytes())
    content[20:24] = (100_000).to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "more.png").write_bytes(content)
    with pytest.raises(
        ImageError, match=r"more\.png claims 100000 x 2000 pixels and holds \d+ bytes .* Copy or download"
    ):
        read_image(tmp_path / "more.png")
