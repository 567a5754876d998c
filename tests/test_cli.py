"""The command line as a user meets it: exit codes, messages, and no traceback for anything a user gives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import run_command
from data.packages import make_pascal, write_ids
from pamm.command_line import COMMANDS
from pamm.config.experiment import dump
from pamm.images import image_size
from pamm.training.run import train
from tiny import experiment


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run folder of the tiny network."""
    folder = tmp_path_factory.mktemp("trained")
    train(experiment(str(folder / "rooms"), steps=2), folder / "run", progress=False)
    return folder / "run"


@pytest.fixture
def photographs(tmp_path) -> Path:
    """A folder data set of four images with two tasks."""
    root = tmp_path / "photographs"
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for kind in ("images", "semseg", "depth"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(generator.integers(0, 256, (50, 60, 3), np.uint8)).save(
                root / split / f"images/{index}.jpg"
            )
            Image.fromarray(generator.integers(0, 3, (50, 60), np.uint8)).save(root / split / f"semseg/{index}.png")
            depth = generator.integers(500, 5000, (50, 60)).astype(np.uint16)
            Image.fromarray(depth).save(root / split / f"depth/{index}.png")
    (root / "dataset.yaml").write_text("tasks:\n  semseg: {classes: [a, b, c]}\n  depth: {unit: millimetre}\n")
    return root


def told(capsys, *arguments: object, code: int = 1) -> str:
    """What the command said of a mistake."""
    return run_command(capsys, *arguments, code=code)


def train_arguments(root: Path, out: Path, *more: object) -> list[object]:
    """`pamm train` on the photographs with a network small enough for a test."""
    given = out.with_suffix(".yaml")
    settings = experiment(steps=1, batch=1)
    dump(settings, given)
    changes = ["--data.name", "folder", "--data.root", root, "--quiet", *more]
    return ["train", given, "--out", out, "--tasks", "semseg,depth", *changes]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help(command, capsys):
    assert "usage" in told(capsys, command, "--help", code=0)


def test_help_version_and_unknown_command(capsys):
    assert "demo" in told(capsys, "--help", code=0)
    assert told(capsys, "--version", code=0).startswith("pamm ")
    assert "unknown command 'trian'" in told(capsys, "trian", code=2)


def test_recipes_are_listed_and_printed(capsys):
    listed = told(capsys, "recipes", code=0)
    assert "pascal-pamm-l" in listed and "no-priors" in listed
    of_invpt = listed[listed.index("recipes of invpt:") :].split("recipes of")[1]
    assert "pascal-invpt-l" in of_invpt and "nyud-invpt-l" in of_invpt and "mlore" not in of_invpt
    assert "top_k: 7" in told(capsys, "recipes", "nyud-pamm-b+top-7", code=0)


def test_doctor_explains_the_engines(capsys):
    text = told(capsys, "doctor", code=0)
    for part in ("torch ", "reference", "step", "native", "ready", "3×3 convolutions", "matrix products"):
        assert part in text


def test_a_folder_of_photographs_trains_and_evaluates(photographs, tmp_path, capsys):
    assert "mIoU" in told(capsys, *train_arguments(photographs, tmp_path / "run", "--data.fit", True), code=0)
    out = tmp_path / "result.json"
    text = told(capsys, "eval", tmp_path / "run", "--device", "cpu", "--untrained", "--out", out, code=0)
    assert "untrained" in text and "val split, 1 images, frame 48×64" in text
    assert set(json.loads(out.read_text())["results"]) == {"semseg", "depth"}


@pytest.mark.slow
def test_boundaries_are_measured_on_the_benchmarks_own_list(shared, tmp_path, capsys):
    parts, ids = shared / "data" / "pascal_part", ["2008_000652", "2008_001978", "2008_005643"]
    make_pascal(tmp_path / "PASCALContext", parts, ids, lambda image_id: image_size(parts / f"{image_id}.jpg"))
    write_ids(tmp_path / "PASCALContext" / "ImageSets" / "Context" / "test_new.txt", ids[-1:])
    pascal = [
        "--data.name",
        "pascal",
        "--data.root",
        tmp_path,
        "--data.size",
        96,
        96,
        "--data.fit",
        True,
        "--tasks",
        "edge",
        "--quiet",
    ]
    given = tmp_path / "tiny.yaml"
    dump(experiment(steps=1, batch=1), given)
    told(capsys, "train", given, "--out", tmp_path / "run", *pascal, code=0)
    text = told(capsys, "eval", tmp_path / "run", "--device", "cpu", "--split", "test_new", code=0)
    assert "odsF" in text and "pascal test_new split, 1 images" in text


def test_unknown_recipe(capsys):
    assert "unknown recipe 'demoo'. Did you mean 'demo'" in told(capsys, "train", "demoo")


def test_unknown_key_on_the_command_line(capsys):
    assert "--train.step" in told(capsys, "train", "demo", "--train.step", "3", code=2)


def test_wrong_type_on_the_command_line(capsys):
    assert "--train.steps" in told(capsys, "train", "demo", "--train.steps", "many", code=2)


def test_unknown_key_in_a_file(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("train: {stepps: 3}\n")
    assert "unknown key 'train.stepps'. Did you mean 'steps'" in told(capsys, "train", tmp_path / "mine.yaml")


def test_unknown_task(capsys):
    assert "--tasks: 'dept' is none of this experiment's tasks" in told(capsys, "train", "demo", "--tasks", "dept")


def test_missing_data_root(tmp_path, capsys):
    assert "nowhere" in told(capsys, *train_arguments(tmp_path / "nowhere", tmp_path / "run"))
    assert "nowhere" in told(capsys, "data", "folder-pamm", "--root", tmp_path / "nowhere")


def test_truncated_jpeg(photographs, tmp_path, capsys):
    for image in (photographs / "train/images").iterdir():
        image.write_bytes(image.read_bytes()[:700])
    for workers in (0, 1):
        text = told(capsys, *train_arguments(photographs, tmp_path / "run", "--train.workers", workers))
        assert ".jpg" in text and "truncated" in text


def test_empty_image(photographs, tmp_path, capsys):
    for image in (photographs / "train/images").iterdir():
        image.write_bytes(b"")
    assert ".jpg" in told(capsys, *train_arguments(photographs, tmp_path / "run"))


def test_label_of_another_size_than_its_image(photographs, tmp_path, capsys):
    for label in (photographs / "train/semseg").iterdir():
        Image.fromarray(np.zeros((50, 61), np.uint8)).save(label)
    text = told(capsys, *train_arguments(photographs, tmp_path / "run"))
    assert "50" in text and "61" in text and "60" in text


def test_class_index_out_of_range(photographs, tmp_path, capsys):
    for label in (photographs / "train/semseg").iterdir():
        Image.fromarray(np.full((50, 60), 7, np.uint8)).save(label)
    text = told(capsys, *train_arguments(photographs, tmp_path / "run"))
    assert "7" in text and "3 classes" in text


def test_a_batch_that_cannot_be_shared(photographs, tmp_path, capsys):
    text = told(capsys, *train_arguments(photographs, tmp_path / "run", "--train.batch", 3, "--train.accumulate", 2))
    assert "train.batch" in text and "multiple of 2" in text


def test_a_size_that_is_no_multiple_of_the_patch(photographs, tmp_path, capsys):
    text = told(capsys, *train_arguments(photographs, tmp_path / "run", "--data.size", 50, 64))
    assert "50×64" in text and "multiple" in text and "56×64" in text


def test_a_checkpoint_of_another_architecture(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    settings = json.loads((tmp_path / "run/best/config.json").read_text())
    settings["model"]["decoder"]["state_size"] = 8
    (tmp_path / "run/best/config.json").write_text(json.dumps(settings))
    assert "another architecture" in told(capsys, "eval", tmp_path / "run")


def test_a_pickle_in_place_of_weights(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "model.pth").write_bytes(b"\x80\x04K\x01.")
    assert "a pickle can run code" in told(capsys, "predict", tmp_path / "model.pth", tmp_path)


def test_predict_writes_maps_and_reports_bad_files(trained, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)).save(images / "good.png")
    (images / "empty.jpg").write_bytes(b"")
    formats = ["--formats", "picture, npy,picture"]
    text = told(capsys, "predict", trained, images, "--out", tmp_path / "out", "--device", "cpu", *formats)
    assert "1 of 2 images" in text and "empty.jpg" in text
    depth = [path for path in (tmp_path / "out").rglob("*.npy") if "depth" in str(path)]
    assert len(depth) == 1 and np.load(depth[0]).shape == (61, 83)
    assert "nothing" in told(capsys, "predict", trained, tmp_path / "nothing*", "--out", tmp_path / "out2")


def test_a_giant_png_is_refused_before_it_is_decoded(trained, tmp_path, capsys):
    Image.new("1", (30_000, 30_000)).save(tmp_path / "giant.png")
    text = told(capsys, "predict", trained, tmp_path / "giant.png", "--out", tmp_path / "out", "--device", "cpu")
    assert "giant.png" in text and "30000" in text.replace(" ", "").replace(",", "")


def test_evaluating_on_other_classes_is_refused(trained, photographs, tmp_path, capsys):
    given = tmp_path / "given.yaml"
    given.write_text(f"data: {{name: folder, root: {photographs}, size: [48, 64]}}\n")
    assert "classes of 'semseg' differ" in told(capsys, "eval", trained, "--data", given)


def test_python_m_pamm():
    done = subprocess.run([sys.executable, "-m", "pamm", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("pamm ")


def test_a_file_is_named_as_text_however_the_error_holds_it():
    """TensorBoard opens its file by a name of bytes."""
    from pamm.cli import told

    for name in ("run/events", b"run/events", Path("run/events")):
        assert told(FileNotFoundError(2, "No such file or directory", name)).startswith("run/events: No such file")
    assert "run/\\x1b[31m" in told(FileNotFoundError(2, "No such file or directory", "run/\x1b[31m"))
