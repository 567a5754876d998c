"""Label pixels: the values that a PNG stores, whatever its bits, colours and metadata, through every reader."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from data.png_files import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, png
from pamm.config.experiment import DataConfig
from pamm.data import open_dataset
from pamm.evaluation.boundaries.files import read_map, read_truths
from pamm.images import ImageError, read_image, read_values
from pamm.tasks import LabelError, create_task

RNG = np.random.default_rng(0)
CLASSES = [f"class {index}" for index in range(18)]


def indices(bits: int, size: tuple[int, int] = (13, 21)) -> np.ndarray:
    values = RNG.integers(0, min(2**bits, 18), size)
    values[0, :2] = 0, min(2**bits, 18) - 1
    return values


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("colour", [GREY, PALETTE])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [1, 7, 21])
def test_class_indices_of_any_bits_are_read_as_stored(tmp_path, bits, colour, interlaced, width):
    values = indices(bits, (13, 21))[:, :width]
    path = png(tmp_path / "a.png", values, bits=bits, colour=colour, interlaced=interlaced)
    np.testing.assert_array_equal(read_values(path), values)
    np.testing.assert_array_equal(create_task("semseg", classes=CLASSES).read(path)[0], values)
    np.testing.assert_array_equal(create_task("human_parts", classes=CLASSES).read(path)[0], values)
    np.testing.assert_array_equal(read_truths(path, outline=True)[0].shape, values.shape)


def test_the_bits_of_grey_stand_for_themselves_beside_transparency(tmp_path):
    values = indices(4)
    path = png(tmp_path / "a.png", values, bits=4, before=[(b"tRNS", b"\0\3")])
    np.testing.assert_array_equal(read_values(path), values)
    path = png(tmp_path / "b.png", values, bits=4, colour=PALETTE, before=[(b"tRNS", b"\0\1\2")])
    np.testing.assert_array_equal(read_values(path), values)


def test_a_class_that_the_data_set_lacks_is_told_by_its_stored_index(tmp_path):
    path = png(tmp_path / "a.png", np.full((3, 4), 15), bits=4)
    with pytest.raises(LabelError, match="class index 15 at row 0, column 0, but semseg has 3 classes"):
        create_task("semseg", classes=["a", "b", "c"]).read(path)


@pytest.mark.parametrize(
    ("bits", "colour", "told"),
    [
        (16, GREY, "16-bit grey"),
        (8, GREY_ALPHA, "8-bit grey and alpha"),
        (16, GREY_ALPHA, "16-bit grey and alpha"),
        (8, RGB, "8-bit RGB"),
        (8, RGBA, "8-bit RGBA"),
    ],
)
def test_class_labels_of_another_kind_are_refused_and_told(tmp_path, bits, colour, told):
    values = np.zeros((3, 4, {GREY: 1, GREY_ALPHA: 2, RGB: 3, RGBA: 4}[colour]), int)
    path = png(tmp_path / "a.png", values, bits=bits, colour=colour)
    with pytest.raises(LabelError, match=rf"a\.png is an? {told} PNG, expected an 8-bit grey or palette PNG"):
        create_task("semseg").read(path)


def test_channels_of_sixteen_bits_are_refused_where_half_would_be_lost(tmp_path):
    path = png(tmp_path / "a.png", RNG.integers(0, 65536, (3, 4, 3)), bits=16, colour=RGB)
    with pytest.raises(LabelError, match="is a 16-bit RGB PNG, expected an 8-bit RGB PNG of normals"):
        create_task("normals").read(path)
    with pytest.raises(ImageError, match="16-bit RGB values, of which 8 bits would be lost"):
        read_values(path)


@pytest.mark.parametrize("interlaced", [False, True])
def test_sixteen_bits_of_depth_are_read_as_stored(tmp_path, interlaced):
    values = RNG.integers(0, 65536, (9, 11))
    path = png(tmp_path / "a.png", values, bits=16, interlaced=interlaced)
    np.testing.assert_array_equal(read_values(path), values)
    assert read_values(path).dtype == np.uint16
    np.testing.assert_allclose(create_task("depth").read(path)[0], values / 1000, rtol=1e-6)
    for bits in (1, 4, 8):
        png(path, np.zeros((9, 11), int), bits=bits)
        with pytest.raises(LabelError, match=f"is an? {bits}-bit grey PNG, expected a 16-bit grey PNG of depth"):
            create_task("depth").read(path)


def write_all(root, files):
    for name, (values, options) in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        png(root / name, values, **options)


def first_labels(root, data, tasks):
    options = {"semseg": {"classes": CLASSES}}
    tasks = {name: create_task(name, **options.get(name, {})) for name in tasks}
    return open_dataset(DataConfig(name=data, root=str(root)), "train", tasks)[0].labels


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_public_data_sets_read_the_values_of_few_bits(tmp_path, bits):
    values, image = indices(bits), (np.zeros((13, 21, 3), int), {"colour": RGB})
    few, mask = (values, {"bits": bits}), ((values > 0) * (2**bits - 1), {"bits": bits})
    nyud = {"images/1.png": image, "segmentation/1.png": few, "edge/1.png": mask}
    write_all(tmp_path / "NYUDv2", nyud)
    (tmp_path / "NYUDv2/gt_sets").mkdir()
    (tmp_path / "NYUDv2/gt_sets/train.txt").write_text("1\n")
    labels = first_labels(tmp_path, "nyud", ["semseg", "edge"])
    np.testing.assert_array_equal(labels["semseg"][0], (values - 1).astype(np.uint8))
    np.testing.assert_array_equal(labels["edge"][0], values > 0)

    pascal = {"JPEGImages/1.jpg": image, "semseg/VOC12/1.png": few, "sal_distill/1.png": mask}
    write_all(tmp_path / "PASCALContext", pascal)
    (tmp_path / "PASCALContext/ImageSets/Context").mkdir(parents=True)
    (tmp_path / "PASCALContext/ImageSets/Context/train.txt").write_text("1\n")
    labels = first_labels(tmp_path, "pascal", ["semseg", "sal"])
    np.testing.assert_array_equal(labels["semseg"][0], values)
    np.testing.assert_array_equal(labels["sal"][0], values > 0)

    names = ("leftImg8bit/train/ulm/1_leftImg8bit.png", "gtFine/train/ulm/1_gtFine_labelIds.png")
    write_all(tmp_path / "cityscapes_all", dict(zip(names, (image, few), strict=True)))
    known = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4}  # road, sidewalk, building, wall, fence
    expected = np.vectorize(lambda image_id: known.get(image_id, 255))(values)
    np.testing.assert_array_equal(first_labels(tmp_path, "cityscapes", ["semseg"])["semseg"][0], expected)


# -- masks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sal", "edge"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_mask_holds_nothing_and_the_largest_value_of_its_bits(tmp_path, name, bits):
    mask = RNG.integers(0, 2, (7, 9))
    path = png(tmp_path / "a.png", mask * (2**bits - 1), bits=bits)
    np.testing.assert_array_equal(create_task(name).read(path)[0], mask)
    for same in (0, 1):
        png(path, np.full((7, 9), same * (2**bits - 1)), bits=bits)
        assert create_task(name).read(path).unique().tolist() == [same]


@pytest.mark.parametrize("name", ["sal", "edge"])
@pytest.mark.parametrize(
    ("levels", "bits", "told"),
    [
        ((0, 1, 255), 8, "0, 1, 255"),
        ((0, 100), 8, "0 and 100"),
        ((0, 2), 8, "0 and 2"),
        ((0, 128, 255), 8, "0, 128, 255"),
        ((0, 254), 8, "0 and 254"),
        ((200,), 8, "200"),
        ((0, 1), 8, "0 and 1 only"),
        ((0, 1), 4, "0 and 1 only"),
        ((0, 7, 15), 4, "0, 7, 15"),
        ((0, 2), 2, "0 and 2"),
        (tuple(range(128)), 8, "0, 1, 2, 3, 4, 5, 6, 7 and 120 more"),
    ],
)
def test_other_values_of_masks_are_refused_with_what_was_found(tmp_path, name, levels, bits, told):
    values = np.resize(levels, (16, 32))
    path = png(tmp_path / "a.png", values, bits=bits)
    with pytest.raises(
        LabelError, match=rf"a\.png holds the values {told}.*expected a grey PNG, 0 = no, {2**bits - 1} ="
    ):
        create_task(name).read(path)


@pytest.mark.parametrize("name", ["sal", "edge"])
def test_a_palette_or_colours_are_no_mask(tmp_path, name):
    path = png(tmp_path / "a.png", np.eye(5, dtype=int), bits=1, colour=PALETTE)
    with pytest.raises(LabelError, match="is a 1-bit palette PNG, expected a grey PNG"):
        create_task(name).read(path)


@pytest.mark.parametrize("name", ["sal", "edge"])
def test_a_prediction_keeps_its_probability_and_is_a_label_again(tmp_path, name):
    probability = RNG.random((12, 10)).astype(np.float32)
    suffix, content = create_task(name).label_file(probability)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    np.testing.assert_array_equal(create_task(name).read(path)[0], probability >= 0.5)
    assert np.abs(np.asarray(Image.open(path)) / 255 - probability).max() <= 0.5 / 255 + 1e-6
    if name == "edge":
        np.testing.assert_allclose(read_map(path), probability, atol=0.5 / 255 + 1e-6)
    Image.open(path).save(path)  # another program's copy, without the note that says what the levels are
    np.testing.assert_array_equal(create_task(name).read(path)[0], probability >= 0.5)


@pytest.mark.parametrize("name", ["sal", "edge"])
def test_a_map_of_many_levels_is_soft_unless_none_is_above_half(tmp_path, name):
    levels = np.linspace(0, 255, 300).round().astype(np.uint8).reshape(15, 20)
    np.testing.assert_array_equal(create_task(name).read(png(tmp_path / "a.png", levels))[0], levels > 127)
    for values in (levels // 2, np.arange(40).reshape(5, 8)):  # indices of classes, say: all would be a no
        path = png(tmp_path / "b.png", values)
        with pytest.raises(LabelError, match=r"holds the values 0, 1, 2.* and \d+ more, expected .*soft: true"):
            create_task(name).read(path)
        np.testing.assert_array_equal(create_task(name, soft=True).read(path)[0], values > 127)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_boundary_maps_and_truths_of_any_bits(tmp_path, bits):
    full = 2**bits - 1
    probability = np.linspace(0, full, 30).round().astype(int).reshape(5, 6)
    np.testing.assert_allclose(read_map(png(tmp_path / "map.png", probability, bits=bits)), probability / full)
    lines = np.zeros((9, 9), int)
    lines[4] = full
    [truth] = read_truths(png(tmp_path / "truth.png", lines, bits=bits), outline=False)
    np.testing.assert_array_equal(truth, lines > 0)


# -- metadata ----------------------------------------------------------------------------------------------------------------

MUCH = 3_000_000
METADATA = {
    "zTXt": (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(MUCH), 9)),
    "iTXt packed": (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(MUCH), 9)),
    "iTXt plain": (b"iTXt", b"Comment\0\0\0\0\0" + b"x" * MUCH),
    "tEXt": (b"tEXt", b"Comment\0" + b"x" * MUCH),
    "iCCP": (b"iCCP", b"profile\0\0" + zlib.compress(bytes(MUCH), 9)),
    "damaged zTXt": (b"zTXt", b"Comment\0\0" + b"no zlib stream"),
    "damaged iCCP": (b"iCCP", b"profile\0\0" + b"no zlib stream"),
    "EXIF in text": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\n" * MUCH, 9)),
    "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b" " * MUCH, 9)),
    "damaged EXIF": (b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "private": (b"npTc", bytes(MUCH)),
}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("kind", METADATA)
def test_metadata_are_no_reason_to_refuse_pixels(tmp_path, kind, where):
    values = RNG.integers(0, 18, (13, 21))
    path = png(tmp_path / "a.png", values, **{where: [METADATA[kind]]})
    np.testing.assert_array_equal(read_image(path)[..., 0], values)
    np.testing.assert_array_equal(read_image(io.BytesIO(path.read_bytes()))[..., 0], values)
    np.testing.assert_array_equal(create_task("semseg", classes=CLASSES).read(path)[0], values)


def test_many_texts_are_passed_over(tmp_path):
    values = RNG.integers(0, 18, (13, 21))
    texts = [(b"tEXt", b"Comment\0" + bytes(1_000_000))] * 70  # beyond Pillow's sum of all texts
    path = png(tmp_path / "a.png", values, before=texts)
    np.testing.assert_array_equal(read_values(path), values)


def test_a_bomb_in_a_text_takes_no_memory(tmp_path):
    import tracemalloc

    pieces = zlib.compressobj(9)
    bomb = b"".join(pieces.compress(bytes(10_000_000)) for _ in range(30)) + pieces.flush()
    chunks = [(b"zTXt", b"Comment\0\0" + bomb), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb)]
    path = png(tmp_path / "a.png", RNG.integers(0, 18, (13, 21)), before=chunks)
    tracemalloc.start()
    read_values(path)
    read_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000, peak


@pytest.mark.parametrize("keyword", ["exif", "text", "xmp"])
def test_what_tells_how_a_picture_is_turned_is_kept(tmp_path, keyword):
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes()
    profile = f"\nexif\n{len(body):8}\n{body.hex()}\n".encode()
    chunks = {
        "exif": (b"eXIf", body.removeprefix(b"Exif\0\0")),
        "text": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        "xmp": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'),
    }
    values = RNG.integers(0, 256, (6, 9))
    path = png(tmp_path / "a.png", values, before=[chunks[keyword]])
    np.testing.assert_array_equal(read_image(path)[..., 0], np.rot90(values, -1))


def test_damaged_pixels_are_still_told(tmp_path):
    path = png(tmp_path / "a.png", RNG.integers(0, 18, (200, 200)), before=[METADATA["tEXt"]])
    content = bytearray(path.read_bytes())
    content[-400] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.png is not a whole picture"):
        read_values(path)
