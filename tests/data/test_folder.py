"""Folder data sets: the real mosaic, and every way in which a folder can be wrong."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.packages import as_user
from pamm.config.experiment import DataConfig
from pamm.data import DataError, dataset_options, open_dataset
from pamm.data.inspect import format_inspection, inspect_dataset
from pamm.tasks import create_task

YAML = """
splits: {train: 3, val: 1}
tasks:
  semseg: {classes: [sky, tree, road]}
  sal: {}
labelled:
  train: {semseg: 2, sal: 1}
"""


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    """Three training images, two with a class map, one with a mask; one validation image without labels."""
    random = np.random.default_rng(0)
    root = tmp_path / "mine"
    for split, count in (("train", 3), ("val", 1)):
        for index in range(count):
            write(root / split / "images" / f"{index}.png", random.integers(0, 256, (20, 30, 3)))
    for index in range(2):
        write(root / "train" / "semseg" / f"{index}.png", random.integers(0, 3, (20, 30)))
    write(root / "train" / "sal" / "2.png", np.full((20, 30), 255))
    (root / "dataset.yaml").write_text(YAML)
    return root


def open_split(root, split="train", names=("semseg", "sal")):
    config = DataConfig(name="folder", root=str(root))
    options = dataset_options(config)
    return open_dataset(config, split, {name: create_task(name, **options[name]) for name in names})


def read_all(dataset):
    return [dataset[index] for index in range(len(dataset))]


def test_each_image_comes_with_the_labels_it_has(root):
    dataset = open_split(root)
    samples = read_all(dataset)
    assert [sample.id for sample in samples] == ["0", "1", "2"]
    assert [set(sample.labels) for sample in samples] == [{"semseg"}, {"semseg"}, {"sal"}]
    assert dataset.labelled() == {"semseg": 2, "sal": 1}
    first = samples[0]
    assert first.image.shape == (3, 20, 30) and first.image.dtype == torch.uint8 and first.size == (20, 30)
    stored = np.asarray(Image.open(root / "train" / "images" / "0.png"))
    np.testing.assert_array_equal(first.image.permute(1, 2, 0), stored)
    np.testing.assert_array_equal(
        first.labels["semseg"][0], np.asarray(Image.open(root / "train" / "semseg" / "0.png"))
    )
    assert [set(s.labels) for s in read_all(open_split(root, "val"))] == [set()]
    assert [set(s.labels) for s in read_all(open_split(root, names=["sal"]))] == [set(), set(), {"sal"}]


def test_without_description_folders_named_like_tasks_count_and_classes_must_be_told(root):
    (root / "dataset.yaml").unlink()
    with pytest.raises(DataError, match=r"class names of 'semseg'.*dataset\.yaml.*classes: \["):
        open_split(root)
    for path in (root / "train" / "semseg").iterdir():
        path.unlink()
    (root / "train" / "semseg").rmdir()
    assert dataset_options(DataConfig(root=str(root))) == {"sal": {}}
    assert len(open_split(root, names=["sal"])) == 3


def test_labels_decide_whether_the_exif_orientation_holds(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root / "train" / "images" / "0.png"
    Image.open(path).save(path, exif=exif)
    assert open_split(root)[0].size == (20, 30)
    write(root / "train" / "semseg" / "0.png", np.zeros((30, 20)))
    assert open_split(root)[0].size == (30, 20)
    os.unlink(root / "train" / "semseg" / "0.png")
    (root / "dataset.yaml").write_text(YAML.replace("semseg: 2", "semseg: 1"))
    assert open_split(root)[0].size == (30, 20)


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


def text(content):
    return lambda root: (root / "dataset.yaml").write_text(content)


BROKEN = {
    "truncated image": (lambda r: truncate(r / "train/images/0.png"), r"images/0\.png is not a whole picture"),
    "empty image": (lambda r: (r / "train/images/0.png").write_bytes(b""), r"images/0\.png is empty"),
    "empty label": (lambda r: (r / "train/semseg/0.png").write_bytes(b""), r"semseg/0\.png .*0 bytes"),
    "label of another size": (
        lambda r: write(r / "train/semseg/0.png", np.zeros((21, 30))),
        r"semseg/0\.png is 21 x 30 \(height x width\), its image .*images/0\.png is 20 x 30\.",
    ),
    "class out of range": (
        lambda r: write(r / "train/semseg/0.png", np.full((20, 30), 3)),
        r"semseg/0\.png.*3.*3 classes",
    ),
    "label without image": (lambda r: write(r / "train/semseg/9.png", np.zeros((20, 30))), r"no image .*9\.png"),
    "label as jpeg": (
        lambda r: [p.rename(p.with_suffix(".jpg")) for p in (r / "train/semseg").iterdir()],
        r"semseg holds 0\.jpg, 1\.jpg: labels of 'semseg' must be \.png files",
    ),
    "one label as jpeg": (
        lambda r: (r / "train/semseg/1.png").rename(r / "train/semseg/1.JPG"),
        r"semseg holds 1\.JPG: labels of 'semseg' must be \.png files",
    ),
    "array for a class map": (
        lambda r: np.save(r / "train/semseg/2.npy", np.zeros((20, 30))),
        r"semseg holds 2\.npy: labels of 'semseg' must be \.png files",
    ),
    "label is a broken link": (
        lambda r: (r / "train/semseg/2.png").symlink_to("nowhere.png"),
        r"semseg/2\.png is a broken link: expected an 8-bit grey",
    ),
    "image is a broken link": (
        lambda r: (r / "train/images/2.png").unlink() or (r / "train/images/2.png").symlink_to("nowhere.png"),
        r"images/2\.png is a broken link to nowhere\.png\. Restore",
    ),
    "label folder of another name": (
        lambda r: (
            (r / "train/sal").rename(r / "train/saliency") and text("tasks: {semseg: {classes: [a, b, c]}, sal: }")(r)
        ),
        r"task 'sal': .*train/sal holds none\. Folders there: images, saliency, semseg\. .*rename.*to 'sal'.*--tasks semseg\.",
    ),
    "two images of one name": (
        lambda r: write(r / "train/images/0.bmp", np.zeros((20, 30, 3))),
        r"both 0\.bmp and 0\.png",
    ),
    "image lost": (
        lambda r: (r / "train/images/2.png").unlink() or (r / "train/sal/2.png").unlink(),
        "found 2 .*states 3",
    ),
    "labels lost": (lambda r: (r / "train/semseg/1.png").unlink(), "semseg: labels: found 1 files, .*states 2"),
    "no images": (lambda r: [p.unlink() for p in (r / "train/images").iterdir()], "no image"),
    "no split": (
        lambda r: (r / "train").rename(r / "training"),
        r"no folder .*train/images.*Splits found: training, val",
    ),
    "not yaml": (text("tasks: {"), r"dataset\.yaml is not a readable YAML file"),
    "key twice": (
        text("tasks: {sal: {}}\nsplits: {train: 3}\ntasks: {}"),
        "the key 'tasks' stands in line 1 and again in line 3",
    ),
    "task twice": (text("tasks:\n  sal: {}\n  sal: {}"), "the key 'sal' stands in line 2 and again in line 3"),
    "alias": (
        text("tasks: &a {sal: {}}\nlabelled: *a"),
        r"not a readable YAML file: line 2, .* an alias, \*a, is not read",
    ),
    "tag": (text("tasks: !!set {sal}"), r"the tag !!set is not read"),
    "endless nesting": (text("[" * 5000), r"dataset\.yaml is not a readable YAML file"),
    "weight": (text("tasks: {sal: {weight: 2}}"), r"weight.*belongs to the experiment.*--tasks\.sal\.weight 2"),
    "classes are one text": (text("tasks: {semseg: {classes: background}}"), r"classes is 'background'.*list of names"),
    "classes are no text": (text("tasks: {semseg: {classes: [yes, no, 3]}}"), r"\[True, False, 3\].*quotes"),
    "no tasks": (text("splits: {train: 3}"), "no mapping 'tasks'"),
    "misspelt key": (text(YAML.replace("splits", "split")), "unknown key 'split'.*Did you mean 'splits'"),
    "unknown task": (text("tasks: {sky: {}}"), "unknown task 'sky'; known tasks"),
    "unknown option": (text("tasks: {sal: {colour: 1}}"), "no option .colour.. Its options: "),
    "options no mapping": (text("tasks: {sal: 3}"), "must be mappings"),
    "count no number": (text("tasks: {sal: {}}\nsplits: {train: many}"), "whole numbers"),
    "count left empty": (text("tasks: {sal: {}}\nlabelled: {train: {sal: }}"), "whole numbers"),
    "split that is not there": (
        text("tasks: {sal: {}}\nsplits: {training: 3}"),
        "'splits' counts the split 'training'",
    ),
    "labels of a split that is not there": (text("tasks: {sal: {}}\nlabelled: {Train: {sal: 3}}"), "the split 'Train'"),
    "labels of a task that is not there": (
        text("tasks: {sal: {}}\nlabelled: {train: {saliency: 3}}"),
        "'labelled: train' counts the task 'saliency', which there is not; expected sal",
    ),
    "tasks empty": (text("tasks: {}"), "no mapping 'tasks'"),
    "classes left empty": (text("tasks: {semseg: {classes: }, sal: {}}"), "class names of 'semseg' are not known"),
    "classes of spaces": (text("tasks: {semseg: {classes: [sky, ' ', tree]}, sal: {}}"), "non-empty"),
    "classes that differ in spaces": (text("tasks: {semseg: {classes: [sky, 'sky ']}, sal: {}}"), "must be different"),
    "UTF-16 without a mark": (
        lambda r: (r / "dataset.yaml").write_bytes(YAML.encode("utf-16-le")),
        "UTF-16, or no text; save it as UTF-8",
    ),
    "description is a folder": (
        lambda r: (r / "dataset.yaml").unlink() or (r / "dataset.yaml").mkdir(),
        r"dataset\.yaml is not a readable YAML file: Is a directory$",
    ),
    "splits no mapping": (text("tasks: {sal: {}}\nsplits: [train]"), "must be mappings"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_is_wrong_is_one_data_error_with_the_name_of_the_file(root, kind):
    damage, message = BROKEN[kind]
    damage(root)
    with pytest.raises(DataError, match=message):
        read_all(open_split(root, names=["semseg", "sal"]))


@pytest.mark.parametrize("empty", ["splits:", "labelled:", "labelled: {train: }", "description:"])
def test_mappings_left_empty_in_the_description_are_empty(root, empty):
    (root / "dataset.yaml").write_text(f"tasks:\n  semseg: {{classes: [sky, tree, road]}}\n  sal:\n{empty}\n")
    assert open_split(root).labelled() == {"semseg": 2, "sal": 1}


def test_a_task_may_lack_labels_in_the_validation_split_only(root):
    (root / "train" / "sal" / "2.png").unlink()
    (root / "dataset.yaml").write_text("tasks: {semseg: {classes: [sky, tree, road]}, sal: {}}")
    assert open_split(root, "val").labelled() == {"semseg": 0, "sal": 0}
    assert open_split(root, names=["semseg"]).labelled() == {"semseg": 2}
    with pytest.raises(DataError, match=r"no image in .*train has a label for task 'sal'.*--tasks semseg"):
        open_split(root)
    train, val = inspect_dataset(DataConfig(root=str(root)))
    assert "no image in" in train.problems[0] and val.problems == []


def test_suffixes_of_any_case_and_arrays_of_depth(root):
    (root / "dataset.yaml").write_text("tasks: {depth: {}, sal: {}}")
    (root / "train" / "depth").mkdir()
    depth = np.full((20, 30), 2.5, np.float32)
    with open(root / "train" / "depth" / "0.NPY", "wb") as file:
        np.save(file, depth)
    (root / "train" / "sal" / "2.png").rename(root / "train" / "sal" / "2.PNG")
    samples = read_all(open_split(root, names=["depth", "sal"]))
    np.testing.assert_array_equal(samples[0].labels["depth"][0], depth)
    assert [set(sample.labels) for sample in samples] == [{"depth"}, set(), {"sal"}]


def test_names_in_either_unicode_form_belong_together(root):
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    (root / "train" / "images" / "0.png").rename(root / "train" / "images" / f"{one}.png")
    (root / "train" / "semseg" / "0.png").rename(root / "train" / "semseg" / f"{two}.png")
    samples = {sample.id: sample for sample in read_all(open_split(root))}
    assert set(samples[one].labels) == {"semseg"}
    write(root / "train" / "semseg" / f"{one}.png", np.zeros((20, 30)))
    with pytest.raises(DataError, match="holds both"):
        open_split(root)


FORBIDDEN = {
    "root": ("", 0o000),
    "root that lists but does not open": ("", 0o444),
    "split": ("train", 0o000),
    "images": ("train/images", 0o000),
    "labels": ("train/semseg", 0o000),
    "description": ("dataset.yaml", 0o000),
    "image": ("train/images/0.png", 0o000),
    "label": ("train/semseg/0.png", 0o000),
}


@pytest.mark.parametrize("place", FORBIDDEN)
def test_what_may_not_be_read_is_told(root, place):
    path, mode = FORBIDDEN[place]
    with as_user(root):
        (root / path).chmod(mode)
        try:
            with pytest.raises(DataError, match=r"may not be read|Permission denied"):
                read_all(open_split(root))
            if place != "label":
                assert inspect_dataset(DataConfig(root=str(root)))[0].problems
        finally:
            (root / path).chmod(0o700)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 4000, "nul\0", "~nobody-of-this-name/data"])
def test_a_root_that_is_no_path_is_told(name):
    with pytest.raises(DataError, match=r"cannot be read|no folder|may not be read"):
        dataset_options(DataConfig(root=name))


def test_missing_root_and_unlabelled_task():
    with pytest.raises(DataError, match=r"data\.root is not set"):
        dataset_options(DataConfig(root=None))
    with pytest.raises(DataError, match="no folder /nowhere"):
        dataset_options(DataConfig(root="/nowhere"))


def test_a_task_without_labels_is_named(root):
    with pytest.raises(DataError, match="no labels for task 'depth'; it has: semseg, sal"):
        open_dataset(DataConfig(root=str(root)), "train", {"depth": create_task("depth")})


def test_inspection_counts_and_collects(root):
    config = DataConfig(root=str(root))
    train, val = inspect_dataset(config, deep=True)
    assert (train.images, train.labels, train.problems) == (3, {"semseg": 2, "sal": 1}, [])
    assert (train.smallest, train.largest) == ((20, 30), (20, 30))
    assert (val.images, val.labels) == (1, {"semseg": 0, "sal": 0})
    write(root / "train" / "semseg" / "0.png", np.full((20, 30), 7))
    truncate(root / "train" / "images" / "2.png")
    assert inspect_dataset(config)[0].problems == []
    problems = inspect_dataset(config, deep=True)[0].problems
    assert len(problems) == 2 and "0.png" in problems[0] and "2.png" in problems[1]
    assert "problem: " in format_inspection(inspect_dataset(config, deep=True))
    (root / "val" / "images" / "0.png").unlink()
    assert "no image" in inspect_dataset(config)[1].problems[0]


def test_the_mosaic_of_real_images_reads_whole(shared):
    root = shared / "data" / "mosaic"
    before = sorted(path.name for path in root.iterdir())
    config = DataConfig(root=str(root))
    train, val = inspect_dataset(config)
    assert (train.images, val.images) == (593, 236)
    assert train.labels == {"semseg": 244, "human_parts": 14, "sal": 200, "edge": 100, "depth": 49, "normals": 49}
    assert train.problems == val.problems == []
    dataset = open_split(root, "val", names=tuple(train.labels))
    for index in range(0, len(dataset), 12):
        sample = dataset[index]
        for name, label in sample.labels.items():
            assert tuple(label.shape[-2:]) == sample.size and label.dtype == dataset.tasks[name].label_dtype
    assert sorted(path.name for path in root.iterdir()) == before
    assert Path(dataset.image_path(0)).is_file()
