"""NYUD-v2: every rule of the packaging on a real frame, and every way in which the folder can be wrong."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data.packages import NYUD_SIZE, make_nyud, snapshot, write_ids, write_png
from pamm.config.experiment import DataConfig
from pamm.data import DataError, dataset_options, open_dataset
from pamm.data.inspect import inspect_dataset
from pamm.tasks import create_task

NAMES = ("semseg", "depth", "normals", "edge")


@pytest.fixture
def root(tmp_path):
    make_nyud(tmp_path / "NYUDv2")
    return tmp_path / "NYUDv2"


def open_split(root, split="train", names=NAMES):
    config = DataConfig(name="nyud", root=str(root))
    options = dataset_options(config)
    return open_dataset(config, split, {name: create_task(name, **options[name]) for name in names})


def test_labels_follow_the_packaging(root):
    before = snapshot(root)
    dataset = open_split(root)
    sample = dataset[1]
    assert list(dataset.ids) == ["0001", "0002"] and sample.id == "0002" and sample.size == NYUD_SIZE
    stored = {name: np.asarray(Image.open(root / name / "0002.png")) for name in ("segmentation", "normals", "edge")}
    np.testing.assert_array_equal(
        sample.image.permute(1, 2, 0), np.asarray(Image.open(root / "images" / "0002.png").convert("RGB"))
    )
    expected = np.where(stored["segmentation"] == 0, 255, stored["segmentation"].astype(int) - 1)
    np.testing.assert_array_equal(sample.labels["semseg"][0], expected)
    np.testing.assert_allclose(
        sample.labels["normals"].permute(1, 2, 0), 2.0 * stored["normals"] / 255 - 1, rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(sample.labels["edge"][0], stored["edge"] // 255)
    np.testing.assert_array_equal(sample.labels["depth"][0], np.load(root / "depth" / "0002.npy"))
    assert 1 < sample.labels["depth"].mean() < 10
    for name, label in sample.labels.items():
        assert label.dtype == dataset.tasks[name].label_dtype and label.shape[0] == dataset.tasks[name].label_channels
    assert snapshot(root) == before


def test_the_parent_folder_is_a_root_too_and_any_subset_of_tasks_is_read(root):
    assert set(open_split(root.parent, "val", ["edge"])[0].labels) == {"edge"}


def test_forty_classes_in_the_data_sets_order(root):
    classes = dataset_options(DataConfig(name="nyud", root=str(root)))["semseg"]["classes"]
    assert len(classes) == 40
    assert [classes[i] for i in (0, 19, 23, 27, 39)] == [
        "wall",
        "floor mat",
        "refridgerator",
        "shower curtain",
        "otherprop",
    ]


def test_labels_of_another_size_are_resized_nearest_and_normals_cubic(root):
    small = {name: np.asarray(Image.open(root / name / "0001.png"))[:40, :60] for name in ("segmentation", "edge")}
    for name, values in small.items():
        write_png(root / name / "0001.png", values)
    depth = np.load(root / "depth" / "0001.npy")[:40, :60]
    np.save(root / "depth" / "0001.npy", depth[..., None])
    normals = cv2.resize(np.asarray(Image.open(root / "normals" / "0001.png")), (60, 40))
    write_png(root / "normals" / "0001.png", normals)
    labels = open_split(root)[0].labels

    def resized(values, how):
        return cv2.resize(values, NYUD_SIZE[::-1], interpolation=how)

    np.testing.assert_array_equal(labels["depth"][0], resized(depth, cv2.INTER_NEAREST))
    np.testing.assert_array_equal(labels["semseg"][0], resized(small["segmentation"] - np.uint8(1), cv2.INTER_NEAREST))
    np.testing.assert_array_equal(labels["edge"][0], resized(small["edge"], cv2.INTER_NEAREST) // 255)
    expected = resized((2.0 * normals / 255 - 1).astype(np.float32), cv2.INTER_CUBIC)
    np.testing.assert_allclose(labels["normals"].permute(1, 2, 0), expected, atol=2e-3)


def test_depth_that_is_no_number_is_ignored(root):
    depth = np.load(root / "depth" / "0001.npy")
    depth[0, :3] = (np.nan, np.inf, -1)
    np.save(root / "depth" / "0001.npy", depth)
    label = open_split(root)[0].labels["depth"]
    assert (label[0, 0, :3] == 0).all() and torch.isfinite(label).all()


def test_one_bit_boundaries_are_read(root):
    write_png(root / "edge" / "0001.png", np.eye(*NYUD_SIZE, dtype=bool))
    np.testing.assert_array_equal(open_split(root)[0].labels["edge"][0], np.eye(*NYUD_SIZE))


def lose(root, *names):
    for name in names:
        (root / name).unlink()


BROKEN = {
    "image lost": (lambda r: lose(r, "images/0002.png"), r"1 of the 2 ids in gt_sets/train\.txt .*images/0002\.png"),
    "folder lost": (lambda r: (r / "normals").rename(r / "n"), r"2 of the 2 ids .*normals/0001\.png"),
    "list lost": (lambda r: lose(r, "gt_sets/train.txt"), r"no split list .*gt_sets/train\.txt"),
    "list empty": (lambda r: write_ids(r / "gt_sets/train.txt", []), "lists no image"),
    "list repeats": (lambda r: write_ids(r / "gt_sets/train.txt", ["0001", "0001"]), "repeats 1 of its 2 ids"),
    "no such root": (lambda r: r.rename(r.parent / "elsewhere"), "holds neither gt_sets/|no folder"),
    "class out of range": (
        lambda r: write_png(r / "segmentation/0001.png", np.full(NYUD_SIZE, 41, np.uint8)),
        r"segmentation/0001\.png holds the value 41, expected 0\.\.40",
    ),
    "colour label": (
        lambda r: write_png(r / "segmentation/0001.png", np.zeros((*NYUD_SIZE, 3), np.uint8)),
        "expected one channel",
    ),
    "grey normals": (lambda r: write_png(r / "normals/0001.png", np.zeros(NYUD_SIZE, np.uint8)), "8-bit RGB normals"),
    "truncated depth": (
        lambda r: (r / "depth/0001.npy").write_bytes((r / "depth/0001.npy").read_bytes()[:500]),
        r"depth/0001\.npy is not a whole \.npy file .*unpack it again",
    ),
    "empty depth": (lambda r: (r / "depth/0001.npy").write_bytes(b""), r"depth/0001\.npy is not a whole \.npy file"),
    "depth in an archive": (
        lambda r: np.savez(r / "a", np.ones(NYUD_SIZE)) or (r / "a.npz").rename(r / "depth/0001.npy"),
        r"depth/0001\.npy is not a whole \.npy file .*unpack it again",
    ),
    "boundaries 0 and 1": (
        lambda r: write_png(r / "edge/0001.png", np.eye(*NYUD_SIZE, dtype=np.uint8)),
        r"edge/0001\.png holds the values 0 and 1 only, expected a grey PNG, 0 = no, 255 = yes",
    ),
    "depth of text": (
        lambda r: np.save(r / "depth/0001.npy", np.array(["a"])),
        r"depth/0001\.npy is not a whole .npy file of numbers \(<U1 .*metres",
    ),
    "truncated image": (
        lambda r: (r / "images/0001.png").write_bytes((r / "images/0001.png").read_bytes()[:5000]),
        r"images/0001\.png is not a whole picture",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_is_wrong_is_one_data_error(root, kind):
    damage, message = BROKEN[kind]
    damage(root)
    with pytest.raises(DataError, match=message):
        open_split(root)[0]


def test_pickled_depth_runs_no_code(root):
    np.save(root / "depth" / "0001.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"depth/0001\.npy is not a whole \.npy file"):
        open_split(root)[0]


def test_the_other_packaging_is_recognised(root):
    for path in (root / "images").iterdir():
        Image.open(path).convert("RGB").save(path.with_suffix(".jpg"))
        path.unlink()
    with pytest.raises(DataError, match=r"NYUD_MT\.tgz.*Use NYUDv2\.tar\.gz"):
        open_split(root)


def test_a_task_without_labels_is_named(root):
    with pytest.raises(DataError, match="no labels for task 'sal'; it has: semseg, depth, normals, edge"):
        open_dataset(DataConfig(name="nyud", root=str(root)), "train", {"sal": create_task("sal")})


def test_inspection_tells_that_this_is_not_the_whole_data_set(root):
    train, val = inspect_dataset(DataConfig(name="nyud", root=str(root)), deep=True)
    assert (train.images, val.images) == (2, 1) and train.problems == val.problems == []
    assert train.labels == dict.fromkeys(NAMES, 2)
    assert "795 were published" in train.notes[0] and "654 were published" in val.notes[0]
