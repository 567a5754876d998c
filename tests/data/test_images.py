"""Reading pictures of every kind, and refusing what is none."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from data.packages import as_user
from pamm.images import ImageError, image_size, read_image, read_values
from pamm.tasks import LabelError, create_task

GRADIENT = np.add.outer(np.arange(30, dtype=np.uint8) * 3, np.arange(40, dtype=np.uint8))


def save(path, picture, **options):
    picture.save(path, **options)
    return path


def huge_png(path, side=30_000):
    """A valid 1-bit PNG of side x side pixels in a few hundred kilobytes."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_colour_is_read_as_stored(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(values))
    np.testing.assert_array_equal(read_image(path), values)
    np.testing.assert_array_equal(read_image(io.BytesIO(path.read_bytes())), values)
    assert image_size(path) == (30, 40)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGBA", "I;16", "I"])
def test_every_kind_of_grey_becomes_rgb(tmp_path, mode):
    if mode.startswith("I"):
        picture = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
        picture = Image.fromarray(GRADIENT.astype(np.int32) * 257) if mode == "I" else picture
    else:
        picture = Image.fromarray(GRADIENT).convert(mode)
    image = read_image(save(tmp_path / ("a.tif" if mode == "I" else "a.png"), picture))
    assert image.shape == (30, 40, 3) and image.dtype == np.uint8
    expected = np.asarray(Image.fromarray(GRADIENT).convert("1")) * 255 if mode == "1" else GRADIENT
    np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, -1))


def test_transparency_is_laid_over_white(tmp_path):
    values = np.zeros((4, 4, 4), np.uint8)
    values[:, :2] = (10, 20, 30, 255)
    image = read_image(save(tmp_path / "a.png", Image.fromarray(values)))
    assert (image[:, :2] == (10, 20, 30)).all() and (image[:, 2:] == 255).all()


def test_cmyk_and_ycbcr_become_rgb(tmp_path):
    cmyk = Image.new("CMYK", (40, 30), (0, 255, 255, 0))
    np.testing.assert_allclose(read_image(save(tmp_path / "a.jpg", cmyk))[0, 0], (255, 0, 0), atol=4)
    red = Image.new("RGB", (40, 30), (255, 0, 0))
    np.testing.assert_allclose(read_image(save(tmp_path / "b.jpg", red))[0, 0], (255, 0, 0), atol=4)


def test_exif_turns_the_picture_unless_told_not_to(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.png", Image.fromarray(GRADIENT), exif=exif)
    np.testing.assert_array_equal(read_image(path)[..., 0], np.rot90(GRADIENT, -1))
    np.testing.assert_array_equal(read_image(path, exif=False)[..., 0], GRADIENT)


def test_palette_labels_keep_their_indices(tmp_path):
    picture = Image.fromarray(GRADIENT % 21)
    picture.putpalette([7] * 768)
    np.testing.assert_array_equal(read_values(save(tmp_path / "a.png", picture)), GRADIENT % 21)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path):
    path = huge_png(tmp_path / "huge.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ImageError, match=r"huge\.png has 30000 x 30000 = 900,000,000 pixels; the limit is 250,000,000"
        ):
            read_image(path)
        assert image_size(path) == (30_000, 30_000)
        assert Image.MAX_IMAGE_PIXELS is not None


def test_the_limit_can_be_chosen(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(GRADIENT))
    assert read_image(path, max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(ImageError, match="Shrink the picture, or cut it into tiles"):
        read_image(path, max_pixels=1199)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    path = save(tmp_path / f"cut.{suffix}", Image.fromarray(noise))
    whole = path.read_bytes()
    for length in (len(whole) // 2, 100, 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError, match=rf"cut\.{suffix} is not a whole picture .*again"):
            read_image(path)
        if suffix == "png":
            with pytest.raises(ImageError, match=r"cut\.png is not a whole picture .*again"):
                read_values(path)


def test_empty_absent_and_foreign_files_are_errors(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    for name, message in (
        ("empty.jpg", r"empty\.jpg is empty \(0 bytes\)"),
        ("text.jpg", r"text\.jpg is not a whole picture"),
        ("absent.jpg", r"no file .*absent\.jpg"),
        ("", "cannot be opened"),
    ):
        with pytest.raises(ImageError, match=message):
            read_image(tmp_path / name)
        with pytest.raises(ImageError, match=message):
            image_size(tmp_path / name)
    with pytest.raises(ImageError, match="the image is not a whole picture"):
        read_image(io.BytesIO(b"no picture"))


def test_broken_links_and_impossible_paths_are_told(tmp_path):
    (tmp_path / "link.png").symlink_to("gone.png")
    (tmp_path / "file.png").touch()
    for path, message in (
        (tmp_path / "link.png", r"link\.png is a broken link to gone\.png\. Restore"),
        (tmp_path / "absent.png", r"no file .*absent\.png\. Check the path"),
        (tmp_path / ("x" * 300 + ".png"), "cannot be opened: File name too long"),
        (tmp_path / "file.png" / "a.png", "cannot be opened: Not a directory"),
    ):
        for read in (read_image, read_values, image_size):
            with pytest.raises(ImageError, match=message):
                read(path)


def test_a_picture_that_may_not_be_read_is_told(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    path = save(folder / "a.png", Image.fromarray(GRADIENT))
    with as_user(folder):
        path.chmod(0)
        with pytest.raises(ImageError, match=r"a\.png may not be read: change the permissions"):
            read_image(path)


def test_a_picture_without_pixels_is_refused(tmp_path):
    path = tmp_path / "none.png"
    data = bytearray(save(path, Image.fromarray(GRADIENT)).read_bytes())
    data[16:24] = bytes(8)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)
    for read in (read_image, read_values, image_size):
        with pytest.raises(ImageError, match=r"none\.png is not a whole picture"):
            read(path)


def test_images_and_labels_have_one_limit_in_any_number_of_threads(tmp_path):
    """A label is judged by its header, whatever other threads do to Pillow's own limit in the meantime."""
    huge, small = huge_png(tmp_path / "huge.png", 15_812), save(tmp_path / "small.png", Image.fromarray(GRADIENT))
    before = Image.MAX_IMAGE_PIXELS

    def attempt(index):
        if index % 2:
            return read_image(small).shape
        with pytest.raises(LabelError, match=r"implausibly large for a label: 15812 x 15812 .*250,000,000"):
            create_task("sal").read(huge)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(attempt, range(400))) == [None, (30, 40, 3)] * 200
    with pytest.raises(ImageError, match="the limit is 250,000,000"):
        read_image(huge)
    assert before == Image.MAX_IMAGE_PIXELS


def test_values_of_unknown_range_are_refused(tmp_path):
    path = save(tmp_path / "a.tif", Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)))
    with pytest.raises(ImageError, match=r"a\.tif holds floating point values"):
        read_image(path)
    path = save(tmp_path / "b.tif", Image.fromarray(np.full((30, 40), 70_000, np.int32)))
    with pytest.raises(ImageError, match=r"b\.tif has values from 70000 to 70000"):
        read_image(path)
