"""What labels hold: the statistics of `pamm data --deep`, and the notes before training."""

import shutil

import numpy as np
import pytest
from PIL import Image

from command import run_command
from pamm.config.experiment import DataConfig
from pamm.data import DataError, dataset_options, open_dataset
from pamm.data.inspect import inspect_dataset, notes_before_training
from pamm.tasks import create_task

HEIGHT, WIDTH = 12, 16


def write(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path, **options)


def make(root, tasks, labels, count=3):
    """A folder data set: random photographs; labels: task → function of the index that gives a label, or None for none."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(count):
            image = random.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
            write(root / split / "images" / f"{index:03d}.png", image)
            for task, label in labels.items():
                values = label(index)
                path = root / split / task / f"{index:03d}.png"
                if isinstance(values, np.ndarray) and values.dtype.kind == "f":
                    path.parent.mkdir(parents=True, exist_ok=True)
                    np.save(path.with_suffix(".npy"), values)
                else:
                    write(path, values)
    (root / "dataset.yaml").write_text(f"tasks: {{{tasks}}}")
    return root


def splits(root):
    config = DataConfig(root=str(root))
    tasks = {name: create_task(name, **options) for name, options in dataset_options(config).items()}
    return [open_dataset(config, split, tasks) for split in ("train", "val")]


def noted(root):
    """The notes of `pamm data --deep` on train, which those before training must equal, apart from the split's name."""
    train = inspect_dataset(DataConfig(root=str(root)), deep=True)[0]
    assert train.problems == []
    before = [note for note in notes_before_training(splits(root)) if note.startswith("train: ")]
    assert before == [f"train: {note}" for note in train.notes]
    return train.notes


def halves(low, high):
    """A map of bytes whose left quarter is `low`, the rest `high`."""
    values = np.full((HEIGHT, WIDTH), high, np.uint8)
    values[:, : WIDTH // 4] = low
    return values


def test_shares_are_those_of_the_pixels(tmp_path, capsys):
    sound = {
        "semseg": lambda index: halves(0, (1, 2, 255)[index]),
        "sal": lambda index: halves(0, 255),
        "depth": lambda index: np.linspace(0, 2.5 + index, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH),
    }
    root = make(tmp_path, "semseg: {classes: [a, b, c]}, sal: {}, depth: {}", sound)
    assert noted(root) == []
    told = run_command(capsys, "data", root, "--deep")
    known = HEIGHT * WIDTH * (1 + 1 + 0.25)
    a, b = (100 * HEIGHT * WIDTH * part / known for part in (0.75, 0.75))
    assert f"semseg: 3 labels: a {a:.3g} %, b {b:.3g} %" in told and "25 % of the pixels ignored" in told
    assert "sal: 3 labels: no 25 %, yes 75 %" in told
    assert "depth: 3 labels: 0.01309 to 4.5 m" in told
    assert told == run_command(capsys, "data", root, "--deep")


def test_two_classes_stored_as_0_and_255_are_told_with_the_remedy(tmp_path, capsys):
    root = make(tmp_path, "semseg: {classes: [background, object]}", {"semseg": lambda index: halves(255, 0)})
    (note,) = noted(root)
    assert "no label holds object" in note and "25 % of the pixels are ignored" in note and "of two classes, 1" in note
    assert note in run_command(capsys, "data", root, "--deep")


def test_labels_that_are_ignored_everywhere_are_named(tmp_path):
    labels = {"semseg": lambda index: halves(0, 1) if index else np.full((HEIGHT, WIDTH), 255, np.uint8)}
    (note,) = noted(make(tmp_path, "semseg: {classes: [a, b]}", labels))
    assert "1 of 3 labels are ignored everywhere" in note and "000" in note


def test_boundaries_dark_on_light_are_told(tmp_path):
    def lines(index):
        values = np.full((HEIGHT, WIDTH), 255, np.uint8)
        values[index + 3] = 0
        return values

    (note,) = noted(make(tmp_path / "inverted", "edge: {}", {"edge": lines}))
    assert note.startswith("edge: 91.7 % ") and "255 minus the values" in note
    assert noted(make(tmp_path / "right", "edge: {}", {"edge": lambda index: 255 - lines(index)})) == []


def test_a_mask_without_any_object_is_told(tmp_path):
    (note,) = noted(make(tmp_path, "edge: {}", {"edge": lambda index: halves(0, 0)}))
    assert "no label holds yes" in note


def metres(low, high):
    return np.linspace(low, high, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("label", "options", "words"),
    [
        (lambda index: np.where(metres(1, 5) > 4, 1e10, metres(1, 5)).astype(np.float32), "", "maximum: 1000"),
        (lambda index: np.where(metres(1, 5) > 4, 65535, metres(1, 5)).astype(np.float32), "", "maximum: 1000"),
        (lambda index: metres(1500, 3500), "", "divide by 1000"),
        (
            lambda index: np.where(metres(0, 1) > 0.9, 65535, 1000 * metres(1, 5)).astype(np.uint16),
            "",
            "maximum: 65.53",
        ),
        (lambda index: (1000 * metres(1, 5)).astype(np.uint16), "unit: metre", "unit: millimetre"),
        (lambda index: metres(0.5, 80), "", ""),
        (lambda index: np.where(metres(1, 5) > 4, 1e10, metres(1, 5)).astype(np.float32), "maximum: 1000", ""),
        (lambda index: metres(100, 200), "unit: disparity", ""),
        (lambda index: metres(1, 40).astype(np.uint16), "", "unit: metre"),
        (
            lambda index: np.where(metres(0, 1) > 0.9, 65535, 256).astype(np.uint16),
            "unit: disparity",
            "maximum: 255.99",
        ),
        (lambda index: np.where(metres(0, 1) > 0.9, 1e10, 9).astype(np.float32), "unit: disparity", "maximum: 1000"),
        (lambda index: np.where(metres(0, 1) > 0.9, 65535, 2560).astype(np.uint16), "unit: 256", "maximum: 255.99"),
    ],
)
def test_the_range_of_depth_tells_sentinels_and_other_units(tmp_path, label, options, words):
    notes = noted(make(tmp_path, f"depth: {{{options}}}", {"depth": label}))
    assert len(notes) == bool(words) and all(words in note for note in notes)
    assert " to " in inspect_dataset(DataConfig(root=str(tmp_path)), deep=True)[0].contents["depth"]


def exif(orientation):
    tag = Image.Exif()
    tag[0x0112] = orientation
    return tag


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("square", [False, True])
def test_images_shown_turned_at_the_size_they_have_are_counted(tmp_path, orientation, square):
    root = make(tmp_path, "semseg: {classes: [a, b]}", {"semseg": lambda index: halves(0, 1)})
    side = (HEIGHT, HEIGHT if square else WIDTH)
    for index, turn in ((0, orientation), (1, 1)):
        shown = side[::-1] if turn > 4 else side
        write(root / "train" / "images" / f"{index:03d}.png", np.zeros((*side, 3), np.uint8), exif=exif(turn))
        write(
            root / "train" / "semseg" / f"{index:03d}.png",
            np.arange(side[0] * side[1]).reshape(shown).astype(np.uint8) % 2,
        )
    notes = noted(root)
    assert len(notes) == (orientation in (2, 3, 4) or (square and orientation > 4))
    assert all("1 of 3 labelled images" in note and ": 000." in note and "exiftool" in note for note in notes)


def test_an_image_that_is_turned_and_has_no_label_is_no_matter(tmp_path):
    root = make(tmp_path, "semseg: {classes: [a, b]}", {"semseg": lambda index: halves(0, 1)})
    write(root / "train" / "images" / "009.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8), exif=exif(3))
    assert noted(root) == []


def test_a_validation_split_without_labels_is_told(tmp_path, capsys):
    root = make(
        tmp_path, "semseg: {classes: [a, b]}, sal: {}", dict.fromkeys(("semseg", "sal"), lambda index: halves(0, 1))
    )
    for folder in (root / "train" / "sal", root / "val" / "sal"):
        for path in folder.iterdir():
            write(path, halves(0, 255))
    shutil.rmtree(root / "val" / "sal")
    told = run_command(capsys, "data", root)
    assert "note: no image has a label of sal, which is not measured" in told
    shutil.rmtree(root / "val" / "semseg")
    told = run_command(capsys, "data", root)
    assert "note: no image has a label: nothing can be measured" in told and "best/ will hold the latest" in told


def test_before_training_a_part_of_many_labels_is_read_and_a_rare_class_is_found(tmp_path):
    root = make(
        tmp_path, "semseg: {classes: [a, b, c]}", {"semseg": lambda index: halves(0, 2 if index == 7 else 1)}, count=30
    )
    assert notes_before_training(splits(root), most=4) == []  # 4 first, then up to 40 while a class is missing
    for split in ("train", "val"):
        write(root / split / "semseg" / "007.png", halves(0, 1))
    notes = notes_before_training(splits(root), most=2)
    assert len(notes) == 2 and all("no label holds c" in note and "seen in 20 of 30 labels" in note for note in notes)


SETTINGS = (
    *(
        "--train.steps",
        1,
        "--train.batch",
        2,
        "--train.workers",
        0,
        "--train.device",
        "cpu",
        "--data.size",
        16,
        16,
    ),
    "--quiet",
)


def test_training_tells_it_before_the_first_step(tmp_path, capsys):
    root = make(tmp_path / "mine", "semseg: {classes: [background, object]}", {"semseg": lambda index: halves(255, 0)})
    told = run_command(capsys, "train", "folder-pamm", "--data.root", root, "--out", tmp_path / "run", *SETTINGS)
    assert "note: train: semseg: no label holds object" in told and "note: val: semseg: no label holds object" in told
    assert told.index("no label holds object") < told.index("run folder")


@pytest.mark.parametrize("empty", [False, True])
def test_training_without_validation_images_does_not_start(tmp_path, capsys, empty):
    root = make(tmp_path / "mine", "semseg: {classes: [a, b]}", {"semseg": lambda index: halves(0, 1)}, count=12)
    shutil.rmtree(root / "val")
    if empty:
        (root / "val" / "images").mkdir(parents=True)
        (root / "val" / "images" / ".keep").touch()
    start = ("train", "folder-pamm", "--data.root", root, "--out", tmp_path / "run", *SETTINGS)
    told = run_command(capsys, *start, code=1)
    assert "val/images" in told and "--data.val-fraction 0.1" in told
    assert not (tmp_path / "run" / "log.jsonl").exists()
    run_command(capsys, *start, "--data.val-fraction", 0.3)
    count = len(open_dataset(DataConfig(root=str(root), val_fraction=0.3), "val", {}))
    told = run_command(capsys, "eval", tmp_path / "run", "--workers", 0)
    assert f"val split, {count} images" in told


def test_a_label_that_cannot_be_read_stops_before_training(tmp_path):
    root = make(tmp_path, "semseg: {classes: [a, b]}", {"semseg": lambda index: halves(0, 1)})
    (root / "val" / "semseg" / "001.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"val/semseg/001\.png"):
        notes_before_training(splits(root))


def test_workers_read_the_same(tmp_path):
    root = make(tmp_path, "semseg: {classes: [a, b]}", {"semseg": lambda index: halves(255, index % 2)}, count=7)
    (root / "train" / "images" / "003.png").write_bytes(b"no picture")
    config = DataConfig(root=str(root))
    one, two = (inspect_dataset(config, deep=True, workers=workers) for workers in (0, 2))
    assert one == two and len(one[0].problems) == 1 and one[0].contents and one[0].largest == (HEIGHT, WIDTH)
