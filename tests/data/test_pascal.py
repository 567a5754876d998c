"""PASCAL-Context: the packaging's rules on real images and real part annotations."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat
from skimage.morphology import thin

from data.packages import make_pascal, snapshot, write_ids, write_png
from pamm.config.experiment import DataConfig
from pamm.data import DataError, dataset_options, open_dataset
from pamm.data.context_classes import NORMALS_LABELS
from pamm.data.inspect import inspect_dataset
from pamm.data.pascal import PART_INDEX
from pamm.data.transforms import EvalTransform
from pamm.images import image_size
from pamm.tasks import create_task

NAMES = ("semseg", "human_parts", "sal", "normals", "edge")
PEOPLE = ("2008_000652", "2008_000726", "2010_005243")
NOBODY = ("2008_001978", "2008_005643")


@pytest.fixture
def root(tmp_path, shared, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parts = shared / "data" / "pascal_part"
    ids = [PEOPLE[0], PEOPLE[1], NOBODY[0], PEOPLE[2], NOBODY[1]]
    make_pascal(tmp_path / "PASCALContext", parts, ids, lambda image_id: image_size(parts / f"{image_id}.jpg"))
    return tmp_path / "PASCALContext"


def open_split(root, split="train", names=NAMES):
    config = DataConfig(name="pascal", root=str(root))
    options = dataset_options(config)
    return open_dataset(config, split, {name: create_task(name, **options[name]) for name in names})


def read_png(root, folder, image_id):
    return np.asarray(Image.open(root / folder / f"{image_id}.png"))


def test_labels_follow_the_packaging_and_nothing_is_written_into_it(root):
    before = snapshot(root)
    dataset = open_split(root)
    assert list(dataset.ids) == [PEOPLE[0], PEOPLE[1], NOBODY[0]]
    for sample in (dataset[index] for index in range(3)):
        image_id = sample.id
        labels = sample.labels
        assert all(tuple(label.shape[-2:]) == sample.size for label in labels.values())
        assert all(label.dtype == dataset.tasks[name].label_dtype for name, label in labels.items())
        np.testing.assert_array_equal(labels["semseg"][0], read_png(root, "semseg/pascal-context", image_id))
        np.testing.assert_array_equal(labels["sal"][0], read_png(root, "sal_distill", image_id) / 255 > 0.5)
        assert labels["sal"][0, 0, :2].tolist() == [0, 1]
        label_map = loadmat(root / "pascal-context" / "trainval" / f"{image_id}.mat")["LabelMap"]
        expected = thin(cv2.Laplacian(label_map, cv2.CV_64F) != 0)
        np.testing.assert_array_equal(labels["edge"][0], expected)
        assert 0.01 < expected.mean() < 0.2
        trusted = np.isin(label_map, list(NORMALS_LABELS))
        normals = 2 * read_png(root, "normals_distill", image_id).astype(np.float32) / 255 - 1
        normals[~trusted] = 255
        np.testing.assert_allclose(labels["normals"].permute(1, 2, 0), normals, atol=1e-6)
        assert 0.1 < trusted.mean() < 0.9
    assert snapshot(root) == before


def test_the_boundary_benchmarks_split_is_a_list_beside_the_others(root):
    with pytest.raises(
        DataError, match=r"no split list .*test_new\.txt: .* train, val\. .*Boundary-Detection-Evaluation-Tools"
    ):
        open_split(root, "test_new")
    write_ids(root / "ImageSets" / "Context" / "test_new.txt", [NOBODY[1]])
    dataset = open_split(root, "test_new")
    assert [sample.id for sample in map(dataset.__getitem__, range(len(dataset)))] == [NOBODY[1]]
    np.testing.assert_array_equal(dataset[0].labels["edge"], open_split(root, "val")[1].labels["edge"])


def test_human_parts_equal_an_independent_reading_of_the_annotations(root, shared):
    """The mosaic's part maps were made from the same files by another program."""
    maps = {path.stem: path for path in (shared / "data" / "mosaic").glob("*/human_parts/part_*.png")}
    compared = 0
    for split in ("train", "val"):
        dataset = open_split(root, split, ["human_parts"])
        for sample in (dataset[index] for index in range(len(dataset))):
            label = sample.labels["human_parts"][0]
            assert len(label.unique()) > 2
            np.testing.assert_array_equal(label, np.asarray(Image.open(maps[f"part_{sample.id}"])))
            compared += 1
    assert compared == len(PEOPLE)


def test_part_names_with_left_and_right():
    assert len(PART_INDEX) == 24
    assert {PART_INDEX[name] for name in ("llarm", "rlarm", "lhand", "rhand")} == {4}
    assert (PART_INDEX["luarm"], PART_INDEX["llleg"], PART_INDEX["ruleg"], PART_INDEX["lebrow"]) == (3, 6, 5, 1)


def test_an_image_without_people_is_ignored_in_human_parts(root):
    dataset = open_split(root)
    sample = dataset[2]
    assert sample.id == NOBODY[0] and (sample.labels["human_parts"] == 0).all()
    finished = EvalTransform(dataset.tasks, DataConfig(size=(512, 512)))(sample)
    assert (finished.labels["human_parts"] == 255).all()
    assert (finished.labels["semseg"] != 255).any()


def test_human_parts_alone_leave_out_images_without_people(root):
    parts = root / "ImageSets" / "Parts" / "train.txt"
    assert list(open_split(root, names=["human_parts"]).ids) == [PEOPLE[0], PEOPLE[1]]
    parts.parent.mkdir()
    parts.write_text(json.dumps({PEOPLE[0]: [15, 9], PEOPLE[1]: [9], NOBODY[0]: [], "another": [15]}))
    assert list(open_split(root, names=["human_parts"]).ids) == [PEOPLE[0]]
    before = parts.read_bytes()
    for content in (json.dumps({PEOPLE[0]: [15]}), "no json", "[]"):
        parts.write_text(content)
        assert list(open_split(root, names=["human_parts"]).ids) == [PEOPLE[0], PEOPLE[1]]
        assert parts.read_text() == content
    assert before != parts.read_bytes()
    assert not (root / "ImageSets" / "Parts" / "val.txt").exists()


def test_voc_masks_come_first(root):
    values = np.full(image_size(root / "JPEGImages" / f"{PEOPLE[0]}.jpg"), 20, np.uint8)
    picture = Image.fromarray(values)
    picture.putpalette(list(range(256)) * 3)
    (root / "semseg" / "VOC12").mkdir()
    picture.save(root / "semseg" / "VOC12" / f"{PEOPLE[0]}.png")
    (root / "semseg" / "pascal-context" / f"{PEOPLE[0]}.png").unlink()
    dataset = open_split(root)
    assert (dataset[0].labels["semseg"] == 20).all() and (dataset[1].labels["semseg"] != 20).any()


def test_labels_of_another_size_are_resized(root):
    height, width = image_size(root / "JPEGImages" / f"{PEOPLE[0]}.jpg")
    for folder in ("semseg/pascal-context", "sal_distill", "normals_distill"):
        write_png(root / folder / f"{PEOPLE[0]}.png", read_png(root, folder, PEOPLE[0])[:100, :150])
    sample = open_split(root)[0]
    assert all(label.shape[-2:] == (height, width) for label in sample.labels.values())
    small = read_png(root, "semseg/pascal-context", PEOPLE[0])
    expected = cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(sample.labels["semseg"][0], expected)


def test_one_bit_saliency_is_read(root):
    mask = np.eye(*image_size(root / "JPEGImages" / f"{PEOPLE[0]}.jpg"), dtype=bool)
    write_png(root / "sal_distill" / f"{PEOPLE[0]}.png", mask)
    np.testing.assert_array_equal(open_split(root)[0].labels["sal"][0], mask)


def cached(root):
    return sorted((root.parent / "cache").rglob("*.png"))


def test_boundaries_are_cached_outside_and_renewed_when_damaged_or_outdated(root):
    dataset = open_split(root, names=["edge"])
    label = dataset[0].labels["edge"]
    (path,) = cached(root)
    path.write_bytes(path.read_bytes()[:20])
    assert (dataset[0].labels["edge"] == label).all()
    content = path.read_bytes()
    assert len(content) > 20
    write_png(path, np.zeros(label.shape[1:], np.uint8))
    assert not dataset[0].labels["edge"].any()
    source = root / "pascal-context" / "trainval" / f"{PEOPLE[0]}.mat"
    os.utime(source, ns=(1, 1))
    assert (dataset[0].labels["edge"] == label).all()
    assert len(cached(root)) == 2 and not list((root.parent / "cache").rglob("*.new"))


def test_many_readers_of_one_cold_cache_agree(root):
    with ThreadPoolExecutor(8) as pool:
        labels = list(pool.map(lambda _: open_split(root, names=["edge"])[0].labels["edge"], range(16)))
    assert all((label == labels[0]).all() for label in labels)
    assert len(cached(root)) == 1


def test_without_a_cache_folder_boundaries_are_the_same(root, monkeypatch):
    label = open_split(root, names=["edge"])[0].labels["edge"]
    (root.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "file"))
    monkeypatch.setenv("HOME", str(root.parent / "file"))
    assert (open_split(root, names=["edge"])[0].labels["edge"] == label).all()
    assert list(open_split(root, names=["human_parts"]).ids) == [PEOPLE[0], PEOPLE[1]]


def test_normals_count_on_170_labels():
    assert len(NORMALS_LABELS) == 170
    assert NORMALS_LABELS[427] == "tvmonitor" and NORMALS_LABELS[284] == "person" and NORMALS_LABELS[158] == "floor"
    assert not {"unknown", "sky", "aeroplane", "tree", "building"} & set(NORMALS_LABELS.values())
    assert list(NORMALS_LABELS) == sorted(NORMALS_LABELS) and max(NORMALS_LABELS) <= 459
    assert list(NORMALS_LABELS.values()) == sorted(NORMALS_LABELS.values())


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


MAP = f"pascal-context/trainval/{PEOPLE[0]}.mat"
PART = f"human_parts/{PEOPLE[0]}.mat"
BROKEN = {
    "image lost": (
        lambda r: (r / f"JPEGImages/{PEOPLE[1]}.jpg").unlink(),
        rf"1 of the 3 ids.*JPEGImages/{PEOPLE[1]}\.jpg",
    ),
    "folder lost": (lambda r: (r / "sal_distill").rename(r / "s"), "3 of the 3 ids .*sal_distill/"),
    "mask lost": (
        lambda r: (r / f"semseg/pascal-context/{PEOPLE[0]}.png").unlink(),
        r"semseg/VOC12/.* or semseg/pascal-context/",
    ),
    "truncated image": (lambda r: cut(r / f"JPEGImages/{PEOPLE[0]}.jpg"), "is not a whole picture"),
    "truncated context": (lambda r: cut(r / MAP), rf"{MAP} is not a whole MATLAB file"),
    "truncated parts": (lambda r: cut(r / PART), rf"{PART} is not a whole MATLAB file"),
    "empty parts": (lambda r: (r / PART).write_bytes(b""), rf"{PART} is not a whole MATLAB file"),
    "other context": (lambda r: savemat(r / MAP, {"map": np.ones((3, 3))}), rf"{MAP} has no .*LabelMap"),
    "other parts": (lambda r: savemat(r / PART, {"anno": np.ones((3, 3))}), rf"{PART} has no PASCAL-Part structure"),
    "class out of range": (
        lambda r: write_png(r / f"semseg/pascal-context/{PEOPLE[0]}.png", np.full((213, 320), 21, np.uint8)),
        "holds the value 21, expected 0..20 or 255",
    ),
    "saliency 0 and 1": (
        lambda r: write_png(r / f"sal_distill/{PEOPLE[0]}.png", np.eye(375, 500, dtype=np.uint8)),
        rf"sal_distill/{PEOPLE[0]}\.png holds the values 0 and 1 only",
    ),
    "list empty": (lambda r: write_ids(r / "ImageSets/Context/train.txt", []), "lists no image"),
    "lists lost": (
        lambda r: (r / "ImageSets").rename(r / "Sets"),
        "holds neither ImageSets/Context/ nor PASCALContext/",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_is_wrong_is_one_data_error(root, kind):
    damage, message = BROKEN[kind]
    damage(root)
    with pytest.raises(DataError, match=message):
        open_split(root)[0]


def test_inspection_collects_problems(root):
    cut(root / PART)
    train, val = inspect_dataset(DataConfig(name="pascal", root=str(root.parent)), deep=True)
    assert train.images == 3 and len(train.problems) == 1 and PART in train.problems[0]
    assert val.problems == [] and "5105 were published" in val.notes[0]
    assert (train.smallest, train.largest) == ((240, 320), (375, 500))
