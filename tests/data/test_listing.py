"""No file of a folder is passed over in silence, and lists of names mean the same however they were written."""

import os
import re
import unicodedata

import numpy as np
import pytest
from PIL import Image

from command import run_command
from data.packages import make_cityscapes, make_nyud, write_ids
from pamm.config.experiment import DataConfig
from pamm.data import DataError, dataset_options, open_dataset
from pamm.data.inspect import inspect_dataset
from pamm.data.listing import list_folder, read_ids
from pamm.evaluation.boundaries import BoundaryError
from pamm.evaluation.boundaries.files import pair_files
from pamm.look import LookError
from pamm.look.subjects import from_files
from pamm.prediction import list_inputs
from pamm.tasks import create_task


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path, "PNG")


@pytest.fixture
def root(tmp_path):
    """A folder data set: two images per split, each with a class map."""
    random = np.random.default_rng(0)
    root = tmp_path / "mine"
    for split in ("train", "val"):
        for name in ("a", "b"):
            write(root / split / "images" / f"{name}.png", random.integers(0, 256, (12, 16, 3)))
            write(root / split / "semseg" / f"{name}.png", random.integers(0, 2, (12, 16)))
    (root / "dataset.yaml").write_text("tasks: {semseg: {classes: [sky, tree]}}")
    return root


def open_split(root, split="train", name="folder", **settings):
    config = DataConfig(name=name, root=str(root), **settings)
    options = dataset_options(config)
    return open_dataset(config, split, {task: create_task(task, **options[task]) for task in options})


# -- folders ---------------------------------------------------------------------------------------------------------------

NOT_LABELS = ("a.exr", "a.pfm", "a.mat", "a.gif", "a.tga", "a.jp2", "a.tiff", "a.npz", "a.npy", "a.JPG", "a.webp", "a")
NOT_LABELS += ("a.bin", "a.png.bak", "a.json", "a.txt", "deeper/a.png")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", NOT_LABELS)
def test_a_label_folder_with_something_that_is_not_read_is_refused_by_its_name(root, split, name):
    path = root / split / "semseg" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"0")
    with pytest.raises(DataError, match=rf"semseg holds.* {name.split('/')[0]}.*must be \.png files.*elsewhere"):
        open_split(root, split)


def test_the_mistakes_of_all_label_folders_are_told_at_once(root):
    write(root / "train" / "sal" / "a.png", np.full((12, 16), 255))
    (root / "dataset.yaml").write_text("tasks: {semseg: {classes: [sky, tree]}, sal: {}, depth: {}}")
    for name in ("semseg/a.mat", "sal/a.gif", "depth/a.exr"):
        (root / "val" / name).parent.mkdir(exist_ok=True)
        (root / "val" / name).write_bytes(b"0")
    _, val = inspect_dataset(DataConfig(root=str(root)))
    assert len(val.problems) == 3
    for name in ("a.mat", "a.gif", "a.exr"):
        assert sum(name in problem for problem in val.problems) == 1


@pytest.mark.parametrize("name", ["c.exr", "c.pfm", "c.tga", "c.mat", "c.dng", "c", "c.png.part", "deeper/c.png"])
def test_images_that_are_not_read_are_refused_by_their_names(root, name):
    path = root / "val" / "images" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"0")
    with pytest.raises(DataError, match=rf"images holds.* {name.split('/')[0]}.*images must be .*\.jpg"):
        open_split(root, "val")


def test_what_no_reader_takes_for_data_is_no_mistake(root):
    folders = [root, root / "train", root / "train" / "images", root / "train" / "semseg"]
    for folder in folders:
        for name in (".DS_Store", "._a.png", "Thumbs.db", "desktop.ini", ".gitkeep", "._dataset.yaml"):
            (folder / name).write_bytes(b"0")
    (root / "__MACOSX").mkdir()
    assert open_split(root).ids == ["a", "b"]
    train, _ = inspect_dataset(DataConfig(root=str(root)), deep=True)
    assert train.problems == train.notes == []
    (root / "train" / "images" / "README.md").write_text("photographs of trees")
    train, _ = inspect_dataset(DataConfig(root=str(root)))
    assert train.problems == [] and len(train.notes) == 1 and "README.md" in train.notes[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_notes_in_a_label_folder_are_named(root, split):
    for name in ("classes.txt", "annotations.json", "README"):
        (root / split / "semseg" / name).write_text("sky, tree")
    (note,) = open_split(root, split).notes()
    assert "semseg, not read" in note and "README, annotations.json, classes.txt" in note
    assert open_split(root, split).labelled() == {"semseg": 2}


@pytest.mark.parametrize("split", ["train", "val"])
def test_folders_that_are_no_task_of_the_description_are_named(root, split):
    write(root / split / "saliency" / "a.png", np.zeros((12, 16)))
    write(root / split / "depths" / "a.png", np.zeros((12, 16)))
    (note,) = open_split(root, split).notes()
    assert "saliency" in note and "depths" in note and "'depths' 'depth'" in note
    assert "dataset.yaml lists no such task" in note


def test_a_label_folder_that_the_description_leaves_out_is_told_as_that(root):
    write(root / "train" / "sal" / "a.png", np.zeros((12, 16)))
    (note,) = open_split(root).notes()
    assert "list sal among the tasks" in note and "Did you mean" not in note


def test_without_a_description_a_folder_that_is_no_task_is_told_as_that(root):
    (root / "dataset.yaml").unlink()
    for split in ("train", "val"):
        (root / split / "semseg").rename(root / split / "segmentation")
        write(root / split / "sal" / "a.png", np.zeros((12, 16)))
    (note,) = open_split(root).notes()
    assert "segmentation" in note and "no task has such a name" in note and "dataset.yaml" not in note


@pytest.mark.parametrize("name", ["Images", "image", "imgs"])
def test_a_folder_of_images_under_another_name_is_what_is_told(root, name):
    (root / "train" / "images").rename(root / "train" / name)
    with pytest.raises(DataError, match=rf"no folder .*train/images: .*train holds {name}, semseg"):
        open_split(root)
    assert len(inspect_dataset(DataConfig(root=str(root)), ("train",))[0].problems) == 1


DESCRIPTIONS = ("dataset.yml", "Dataset.yaml", "DATASET.YAML", "dataset.yaml.txt", "dataset.txt", "data.yaml")
DESCRIPTIONS += ("dataset.json", "dataset.yaml~", "dataset.yaml.bak", "dataset")


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_under_another_name_is_refused(root, name):
    (root / "dataset.yaml").rename(root / name)
    with pytest.raises(DataError, match=rf"holds {name}, .*Rename it to dataset\.yaml"):
        open_split(root)
    if name in DESCRIPTIONS[:5]:
        (root / "dataset.yaml").write_text("tasks: {semseg: {classes: [sky, tree]}}")
        with pytest.raises(DataError, match=rf"holds {name}, .*Remove it, or dataset\.yaml"):
            open_split(root)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("A.png", "'A' and 'a' differ in letter case"),
        ("a_mask.png", "leave out '_mask'"),
        ("label-a.png", "leave out 'label-'"),
        (" a.png", "' a' and 'a' differ in spaces"),
        ("z.png", "Add the images or remove the labels"),
    ],
)
def test_a_label_of_a_similar_name_is_told_how_it_differs(root, name, hint):
    (root / "train" / "semseg" / "a.png").rename(root / "train" / "semseg" / name)
    with pytest.raises(DataError, match=f"no image of the same name.*{hint}"):
        open_split(root)


def test_empty_label_files_are_told_without_reading_all(root):
    (root / "val" / "semseg" / "a.png").write_bytes(b"")
    train, val = inspect_dataset(DataConfig(root=str(root)))
    assert train.problems == []
    (problem,) = val.problems
    assert "a.png is empty" in problem


def test_ids_are_in_one_order_whichever_form_their_accents_have(root):
    for split, form in (("train", "NFC"), ("val", "NFD")):
        for name in ("é", "f", "eb"):
            write(root / split / "images" / f"{unicodedata.normalize(form, name)}.png", np.zeros((12, 16, 3)))
    assert open_split(root).ids == open_split(root, "val").ids == ["a", "b", "eb", "f", "é"]


def test_pipes_are_not_opened(root):
    os.mkfifo(root / "train" / "images" / "c.png")
    with pytest.raises(DataError, match=r"images holds c\.png, which is a pipe, a socket or a device"):
        open_split(root)
    inputs = list_inputs([root / "train" / "images"])
    assert [path.name for path in inputs.images] == ["a.png", "b.png"]
    assert "a pipe" in inputs.failures()[0][1] and "not read" not in inputs.failures()[0][1]


def test_control_characters_in_names_are_shown_escaped(root):
    (root / "train" / "images" / "c\x1b[2J.exr").write_bytes(b"0")
    with pytest.raises(DataError) as raised:
        open_split(root)
    assert "\x1b" not in str(raised.value) and r"c\x1b[2J.exr" in str(raised.value)


# -- packages --------------------------------------------------------------------------------------------------------------


def test_appledouble_files_beside_every_file_change_nothing(tmp_path):
    make_cityscapes(tmp_path / "city")
    make_nyud(tmp_path / "nyud")
    for name in ("city", "nyud"):
        kind = "cityscapes" if name == "city" else name
        before = [open_split(tmp_path / name, split, kind).ids for split in ("train", "val")]
        for path in list((tmp_path / name).rglob("*.*")):
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
        assert [open_split(tmp_path / name, split, kind).ids for split in ("train", "val")] == before
        for report in inspect_dataset(DataConfig(name=kind, root=str(tmp_path / name)), deep=True):
            assert report.problems == [] and len(report.notes) <= 1  # fewer images than published


def test_cityscapes_names_what_is_no_image(tmp_path):
    make_cityscapes(tmp_path)
    (tmp_path / "leftImg8bit" / "train" / "ulm" / "ulm_000007_000019_leftImg8bit.jpg").write_bytes(b"0")
    notes = open_split(tmp_path, "train", "cityscapes").notes()
    assert any("ulm_000007_000019_leftImg8bit.jpg" in note for note in notes)


def test_suffixes_of_packages_may_be_in_capitals(tmp_path):
    make_nyud(tmp_path)
    (tmp_path / "images" / "0001.png").rename(tmp_path / "images" / "0001.PNG")
    dataset = open_split(tmp_path, "train", "nyud")
    assert dataset[0].image.shape[0] == 3 and dataset.image_path(0).name == "0001.PNG"


# -- lists of ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_of_ids(tmp_path, encoding, end):
    path = tmp_path / "val.txt"
    lines = ["0001", "", "  living room 2 ", unicodedata.normalize("NFD", "café"), "with\x0bbell"]
    path.write_bytes(end.join(lines).encode(encoding))
    assert read_ids(path) == ["0001", "living room 2", "café", "with\x0bbell"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0001\n".encode("utf-16"), "UTF-16"),
        ("0001\n".encode("utf-16-le"), "UTF-16"),
        ("0001\n".encode("utf-32"), "UTF-16"),
        ("0001\ncafé\n".encode("latin-1"), "line 2 holds the byte 0xe9.*as UTF-8"),
        (b"", "lists no image"),
        (b"\xef\xbb\xbf\n \n", "lists no image"),
        (b"0001\n0002\n0001\n", "repeats 1 of its 3 ids, e.g. 0001"),
        ("caf\u00e9\ncafe\u0301\n".encode(), "repeats 1 of its 2 ids, e.g. caf\u00e9"),
        (b"../0001\n", "names without folders"),
        (b"images/0001\n", "names without folders"),
        (b"images\\0001\n", "names without folders"),
        (b"..\n", "names without folders"),
    ],
)
def test_lists_that_are_none_are_refused_as_what_they_are(tmp_path, content, message):
    path = tmp_path / "val.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_ids(path)


def test_a_list_and_its_files_may_be_in_different_unicode_forms(tmp_path):
    make_nyud(tmp_path, ids=("0001", "0002"))
    for path in list(tmp_path.rglob("0001.*")):
        path.rename(path.with_name(path.name.replace("0001", unicodedata.normalize("NFD", "bureau é"))))
    write_ids(tmp_path / "gt_sets" / "train.txt", [unicodedata.normalize("NFC", "bureau é")])
    dataset = open_split(tmp_path, "train", "nyud")
    assert set(dataset[0].labels) == {"semseg", "depth", "normals", "edge"}


def test_a_list_with_suffixes_is_told(tmp_path):
    make_nyud(tmp_path)
    write_ids(tmp_path / "gt_sets" / "train.txt", ["0001.png"])
    with pytest.raises(DataError, match="Leave the suffixes out"):
        open_split(tmp_path, "train", "nyud")


# -- inputs of predictions and of boundaries ---------------------------------------------------------------------------------


def test_inputs_that_are_not_read_are_counted_with_the_remedy(tmp_path):
    for name in ("a.png", "._a.png", "b.exr", "c", "d.tga", "notes.txt", "Thumbs.db", "deeper/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0")
    for pattern in (tmp_path, f"{tmp_path}/*"):
        inputs = list_inputs([pattern])
        assert [path.name for path in inputs.images] == ["a.png"]
        told = {path.name: reason for path, reason in inputs.failures()}
        assert told.keys() == {"b.exr", "c", "d.tga"}
        assert ".exr" in told["b.exr"] and "convert" in told["b.exr"] and "rename" in told["c"]
        assert any("notes.txt" in note for note in inputs.notes())
    assert any("deeper" in note and "/*.jpg" in note for note in list_inputs([tmp_path]).notes())
    named = list_inputs([tmp_path / "c", tmp_path])  # a file given by its name is taken
    assert [path.name for path in named.images] == ["c", "a.png"]
    assert [path.name for path in named.unread] == ["b.exr", "d.tga"]
    with pytest.raises(LookError, match=r"3 of the files given are not read.*b\.exr"):
        from_files([tmp_path])


def test_boundary_maps_that_are_not_read_are_named(tmp_path):
    maps, truths = tmp_path / "maps", tmp_path / "truths"
    for folder in (maps, truths):
        write(folder / "a.png", np.zeros((8, 8)))
        (folder / "._a.png").write_bytes(b"0")
    assert list(pair_files(maps, truths)) == ["a"]
    (maps / "b.jpg").write_bytes(b"0")
    with pytest.raises((DataError, BoundaryError), match=r"maps holds b\.jpg.*--ids"):
        pair_files(maps, truths)
    (tmp_path / "ids.txt").write_text("a\n")
    assert list(pair_files(maps, truths, tmp_path / "ids.txt")) == ["a"]


def test_list_folder_is_empty_where_there_is_none(tmp_path):
    assert list_folder(tmp_path / "absent", (".png",)).files == {}


# -- a validation split of train's images --------------------------------------------------------------------------------------


@pytest.fixture
def undivided(tmp_path):
    root = tmp_path / "undivided"
    for index in range(40):
        write(root / "train" / "images" / f"{index:03d}.png", np.zeros((12, 16, 3)))
        write(root / "train" / "semseg" / f"{index:03d}.png", np.full((12, 16), index % 2))
    (root / "dataset.yaml").write_text("tasks: {semseg: {classes: [sky, tree]}}\nsplits: {train: 40}")
    return root


def test_a_fraction_of_train_is_the_validation_split(undivided):
    with pytest.raises(DataError, match=r"no folder .*val/images.*--data\.val-fraction"):
        open_split(undivided, "val")
    train, val = (open_split(undivided, split, val_fraction=0.25) for split in ("train", "val"))
    assert not set(train.ids) & set(val.ids) and sorted(train.ids + val.ids) == open_split(undivided).ids
    assert 3 <= len(val) <= 17 and train.labelled() == {"semseg": len(train)}
    larger = open_split(undivided, "val", val_fraction=0.5)
    assert set(val.ids) < set(larger.ids)
    (undivided / "dataset.yaml").write_text("tasks: {semseg: {classes: [sky, tree]}}")
    for index in range(0, 40, 2):  # what becomes of an image depends on its name alone
        os.unlink(undivided / "train" / "images" / f"{index:03d}.png")
        os.unlink(undivided / "train" / "semseg" / f"{index:03d}.png")
    fewer = open_split(undivided, "val", val_fraction=0.25)
    assert fewer.ids == [image_id for image_id in val.ids if int(image_id) % 2]


def test_where_an_image_goes_is_written_down(undivided):
    """SHA-256 of the name: the same on every machine and in every version."""
    import hashlib

    expected = [
        f"{index:03d}"
        for index in range(40)
        if int(hashlib.sha256(f"{index:03d}".encode()).hexdigest()[:16], 16) < 2**62
    ]
    assert open_split(undivided, "val", val_fraction=0.25).ids == expected


def test_fractions_that_leave_nothing_and_a_second_validation_split_are_refused(undivided):
    for split, fraction in (("val", 1e-9), ("train", 1)):
        with pytest.raises(DataError, match=rf"leaves no image to {split} of the 40") as raised:
            open_split(undivided, split, val_fraction=fraction)
        bound = re.search(r"--data\.val-fraction to at (?:least|most) ([0-9.]+),", str(raised.value))
        assert len(open_split(undivided, split, val_fraction=float(bound[1]))) >= 1
    write(undivided / "val" / "images" / "a.png", np.zeros((12, 16, 3)))
    with pytest.raises(DataError, match=r"val_fraction is 0\.1.*val/images holds files too.*or move .*/val elsewhere"):
        open_split(undivided, val_fraction=0.1)


def test_the_command_sees_the_same_split(undivided, capsys):
    val = open_split(undivided, "val", val_fraction=0.25)
    told = run_command(capsys, "data", undivided, "--val-fraction", 0.25)
    assert f"val: {len(val)} images" in told and f"train: {40 - len(val)} images" in told
    assert "no folder" in run_command(capsys, "data", undivided, code=1)
    assert "expected a number from 0 to 1" in run_command(capsys, "data", undivided, "--val-fraction", 2, code=1)
    assert "split of their own" in run_command(capsys, "data", "nyud-pamm-b", "--val-fraction", 0.5, code=1)
