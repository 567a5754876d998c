"""`pamm look` as a user meets it: pictures and numbers in the folder asked for, and what to do where that cannot be."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from looked_at import KINDS, build, photo
from PIL import Image

from command import run_command
from pamm.drawing.sheet import Subject, truth_row
from pamm.look.predictions import compare
from pamm.look.scans import orders_of
from pamm.look.subjects import choose_tasks, open_models, subjects_for
from pamm.models.registry import build_model
from pamm.prediction import Predictor
from pamm.tasks import create_task
from pamm.tasks.pictures import GREY
from pamm.training.checkpoint import save_checkpoint
from tiny import SWIN, experiment


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Saved models of every kind, three photographs, and a folder data set whose images lack some labels."""
    folder = tmp_path_factory.mktemp("look")
    for kind in ("pamm", "baseline", "pamm-released", "mtmamba", "mtmamba++"):
        save_checkpoint(folder / kind, build(kind))
    save_checkpoint(folder / "depth alone", build("pamm", ("depth",)))
    (folder / "photographs").mkdir()
    for number, size in enumerate([(60, 90), (64, 32), (20, 24)]):
        Image.fromarray(photo(*size, number)).save(folder / f"photographs/{number}.png")
    (folder / "no picture.jpg").write_text("text")
    mine, classes = folder / "mine", json.dumps(list(create_task("semseg").options()["classes"]))
    for part in ("train/images", "train/semseg", "val/images", "val/semseg", "val/depth", "train/depth"):
        (mine / part).mkdir(parents=True)
    for split, number in (("train", 0), ("val", 0), ("val", 1), ("val", 2)):
        Image.fromarray(photo(40, 60, number)).save(mine / f"{split}/images/{number}.png")
        if number != 1:
            label = np.full((40, 60), 3, np.uint8)
            label[:10] = 255
            Image.fromarray(label).save(mine / f"{split}/semseg/{number}.png")
            Image.fromarray(np.full((40, 60), 1500, np.uint16)).save(mine / f"{split}/depth/{number}.png")
    (mine / "dataset.yaml").write_text(f"tasks: {{semseg: {{classes: {classes}}}, depth: {{unit: millimetre}}}}\n")
    return folder


def picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 of a picture written."""
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file."""
    with np.load(path) as opened:
        return dict(opened)


def look(capsys, *arguments: object, code: int = 0) -> str:
    """Run `pamm look`; returns what it said."""
    return run_command(capsys, "look", *arguments, code=code)


def test_predictions_of_several_models(place, tmp_path, capsys):
    """Without classes, whose legend grows with those that are predicted."""
    models, tasks = [place / "pamm", place / "mtmamba"], ("--tasks", "depth", "normals")
    for count in (1, 2):
        out = tmp_path / str(count)
        look(capsys, "predictions", *models[:count], "--images", place / "photographs", *tasks, "--out", out)
    one, two = (picture(tmp_path / f"{count}/predictions.png").shape for count in (1, 2))
    assert one[1] == two[1]
    assert two[0] - one[0] == sum(side + 8 for side in (160, 240, 200))  # tile and gap
    facts = json.loads((tmp_path / "2/predictions.json").read_text())
    assert facts["images"] == ["0", "1", "2"] and list(facts["models"]) == ["pamm", "mtmamba"]
    assert facts["tasks"] == ["depth", "normals"]


def test_arrays_are_what_the_predictor_gives(place, tmp_path, capsys):
    photographs = sorted((place / "photographs").iterdir())
    look(capsys, "predictions", place / "pamm", "--images", *photographs, "--arrays", "--out", tmp_path, "--names", "a")
    for path in photographs:
        maps = Predictor(place / "pamm")(path)
        for task in maps:
            assert np.array_equal(np.load(tmp_path / f"a/arrays/{task}/{path.stem}.npy"), maps[task])


def test_models_whose_names_are_one_file_name_keep_folders_of_their_own(place, tmp_path, capsys):
    """As runs/a and runs_a are."""
    models, images = [place / "pamm", place / "mtmamba"], ["--images", place / "photographs", "--arrays"]
    look(capsys, "predictions", *models, *images, "--out", tmp_path, "--names", "a/b", "a_b", "--tasks", "depth")
    first, second = (np.load(tmp_path / f"{name}/arrays/depth/0.npy") for name in ("a_b", "a_b_2"))
    photograph = place / "photographs/0.png"
    assert np.array_equal(first, Predictor(place / "pamm")(photograph)["depth"])
    assert np.array_equal(second, Predictor(place / "mtmamba")(photograph)["depth"])


def test_more_images_than_a_figure_holds_go_into_further_ones(place, tmp_path, capsys):
    (tmp_path / "many").mkdir()
    for number in range(9):
        Image.fromarray(photo(16, 24, number)).save(tmp_path / f"many/{number}.png")
    look(capsys, "predictions", place / "pamm", "--images", tmp_path / "many", "--out", tmp_path / "out", "--tile", 60)
    first, second = (len(picture(tmp_path / "out" / name)) for name in ("predictions.png", "predictions_2.png"))
    assert first > 3 * second


def data_of(place: Path, tmp_path: Path) -> list[object]:
    """Arguments that name the folder data set."""
    from pamm.config.experiment import DataConfig, dump

    settings = replace(experiment(), data=DataConfig(name="folder", root=str(place / "mine"), size=(48, 64)))
    dump(settings, tmp_path / "mine.yaml")
    return ["--data", tmp_path / "mine.yaml"]


def test_truths_of_a_data_set_are_drawn_and_missing_ones_told(place, tmp_path, capsys):
    data = data_of(place, tmp_path)
    for image_id in ("0", "1"):
        look(capsys, "predictions", place / "pamm", *data, "--ids", image_id, "--out", tmp_path / image_id)
    with_truth, without = (len(picture(tmp_path / image_id / "predictions.png")) for image_id in ("0", "1"))
    assert with_truth > without + 100
    look(capsys, "features", place / "pamm", *data, "--count", 2, "--out", tmp_path / "features", "--stages", "fused")
    assert sorted(path.name for path in (tmp_path / "features").glob("*.png")) == ["features_0.png", "features_2.png"]


def test_unlabelled_pixels_of_a_truth_are_grey(place, tmp_path):
    models = open_models([str(place / "pamm")])
    options = data_of(place, tmp_path)
    own = {name: predictor.model for name, predictor in models.items()}
    subjects = subjects_for(own, [str(place / "pamm")], data=str(options[1]), ids=["0"])
    assert subjects[0].valid["semseg"].sum() == 30 * 60 and set(subjects[0].truths) == {"semseg", "depth"}
    np.testing.assert_allclose(subjects[0].truths["depth"], 1.5)
    drawn = np.asarray(truth_row(subjects[0], ["semseg"], tile=60)["semseg"].picture)
    assert (drawn == GREY).all(-1).sum() == 10 * 60


def test_models_share_a_colour_scale():
    """Without a truth, a map of twice the depth is not drawn as the map itself."""
    model = build("pamm", ("depth",))
    twin = build("pamm", ("depth",))
    twin.heads["depth"].predict.weight.data.mul_(2)
    twin.heads["depth"].predict.bias.data.mul_(2)
    subjects = [Subject("a", photo(64, 96))]
    near, far = Predictor(model), Predictor(twin)
    same = np.asarray(compare({"a": near, "b": near}, subjects, ["depth"], tile=96))
    other = np.asarray(compare({"a": near, "b": far}, subjects, ["depth"], tile=96))
    assert same.shape == other.shape and (same != other).any()


@pytest.mark.parametrize("kind", ["pamm", "baseline", "pamm-released", "mtmamba", "mtmamba++"])
def test_features_of_every_kind_of_network(kind, place, tmp_path, capsys):
    look(capsys, "features", place / kind, "--images", place / "photographs/0.png", "--out", tmp_path, "--tile", 100)
    numbers = arrays(tmp_path / "features_0.npz")
    facts = json.loads((tmp_path / "features.json").read_text())
    last = "stage 3" if "mtmamba" in kind else "fused"
    assert numbers[f"{kind}/{last}/depth"].shape[-1] == 3
    assert set(facts["variance"][kind]) == {key.split("/", 1)[1] for key in numbers}
    assert all(1 >= sum(shares) > 0 for shares in facts["variance"][kind].values())
    assert picture(tmp_path / "features_0.png").shape[1] > 4 * 100


@pytest.mark.parametrize("kind", ["pamm", "pamm-released"])
def test_router_weights_as_picture_and_numbers(kind, place, tmp_path, capsys):
    look(capsys, "router", place / kind, "--images", place / "photographs", "--out", tmp_path)
    numbers, facts = arrays(tmp_path / "router.npz"), json.loads((tmp_path / "router.json").read_text())
    assert picture(tmp_path / "router.png").size and facts["rows"] == ["semseg", "depth", "normals"]
    for place_ in ("B/stage 1", "C/stage 2"):
        assert numbers[place_].shape == (3, 3, 5)
        np.testing.assert_allclose(numbers[place_].mean(0), facts["mean"][place_], rtol=1e-6)
        np.testing.assert_allclose((numbers[place_] > 0).mean(0), facts["kept"][place_])
    assert ("B/stage 1/own" in numbers) == (kind == "pamm-released")


def test_scans_need_no_model(tmp_path, capsys):
    look(capsys, "scans", "--grid", 5, 7, "--curve", "hilbert", "cross", "--out", tmp_path, "--tile", 70)
    facts = json.loads((tmp_path / "scans.json").read_text())
    assert facts["grid"] == [5, 7] and list(facts["orders"]["hilbert"]) == ["0°", "90°", "180°", "270°"]
    for curve in ("hilbert", "cross"):
        assert np.array_equal(np.load(tmp_path / f"scans_{curve}.npy"), orders_of(curve, 5, 7))
    assert picture(tmp_path / "scans.png").shape[1] > 4 * 70


@pytest.mark.parametrize("arguments", [["scans"], ["router", "pamm", "--images", "photographs"]], ids=" ".join)
def test_without_matplotlib_the_extra_is_named_before_anything_is_computed(
    arguments, place, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = look(capsys, *arguments, "--out", tmp_path / "out", code=1)
    assert "needs matplotlib: pip install 'pamm[plots]'" in text and not list((tmp_path / "out").iterdir())


WRONG = {
    "no image": (["predictions", "pamm", "--images", "no picture.jpg"], "no picture.jpg is not a whole picture"),
    "no such file": (["features", "pamm", "--images", "gone.jpg"], "no file, folder or glob"),
    "unknown task": (
        ["predictions", "pamm", "--images", "photographs", "--tasks", "albedo"],
        "'albedo' is none of these",
    ),
    "no router": (["router", "mtmamba", "--images", "photographs"], "has no router; .* pamm look features MODEL"),
    "no experts": (["router", "baseline", "--images", "photographs"], "built without experts"),
    "no data": (["predictions", "pamm"], "no experiment.yaml beside .*give photographs: --images photo.jpg"),
    "two kinds of images": (["predictions", "pamm", "--images", "photographs", "--ids", "0"], "exclude one another"),
    "no model": (["features", "runs/gone/too", "--images", "photographs"], "nothing at .*gone"),
    "names": (["predictions", "pamm", "--images", "photographs", "--names", "a", "b"], "--names: found 2 .*expected 1"),
    "twice": (["predictions", "pamm", "pamm", "--images", "photographs"], "pamm is given twice"),
    "stage": (["features", "pamm", "--images", "photographs", "--stages", "9"], "no '9' .*which has 1, 2, fused"),
    "tile": (["scans", "--tile", "5"], "--tile: found 5, expected 60 to 2000 pixels"),
    "curve": (["scans", "--curve", "peano"], "unknown scan curve 'peano'; choose among"),
    "grid": (["scans", "--grid", "0", "3"], "expected sides of 1 to 256"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_shown_is_told_with_the_remedy(case, place, tmp_path, capsys, monkeypatch):
    arguments, message = WRONG[case]
    monkeypatch.chdir(place)
    text = look(capsys, *arguments, "--out", tmp_path, code=1)
    assert re.search(message, text, re.S), text


@pytest.mark.parametrize("option", ["--count", "--longest-side"])
def test_a_number_below_one_is_told(option, place, tmp_path, capsys):
    text = look(capsys, "router", place / "pamm", option, 0, "--out", tmp_path, code=2)
    assert f"argument {option}: found '0', expected a whole number from 1 up" in text


def test_an_unknown_id_is_told_with_the_known_ones(place, tmp_path, capsys):
    text = look(
        capsys, "predictions", place / "pamm", *data_of(place, tmp_path), "--ids", "7", "--out", tmp_path, code=1
    )
    assert "no image '7' among the 3 of the val split; for example: 0" in text


def test_an_image_looked_at_is_never_replaced(place, tmp_path, capsys):
    Image.fromarray(photo(16, 24)).save(tmp_path / "predictions.png")
    before = (tmp_path / "predictions.png").read_bytes()
    text = look(
        capsys, "predictions", place / "pamm", "--images", tmp_path / "predictions.png", "--out", tmp_path, code=1
    )
    assert "would be replaced; choose another folder with --out" in text
    assert (tmp_path / "predictions.png").read_bytes() == before


def test_models_that_mean_different_classes_are_not_mixed(place, tmp_path, capsys):
    other = build_model(KINDS["pamm"], {"semseg": create_task("semseg", classes=["a", "b"])}, (64, 96))
    save_checkpoint(tmp_path / "other", other)
    arguments = [
        "predictions",
        place / "pamm",
        tmp_path / "other",
        "--images",
        place / "photographs",
        "--out",
        tmp_path,
    ]
    assert "different classes for 'semseg'" in look(capsys, *arguments, code=1)
    look(capsys, *arguments, "--tasks", "depth")


def test_a_task_that_one_model_lacks_has_an_empty_tile(place):
    models = open_models([str(place / "depth alone"), str(place / "pamm")])
    assert choose_tasks(models, None) == ["depth", "semseg", "normals"]
    both = compare(models, [Subject("a", photo(64, 96))], ["depth", "semseg"], tile=96)
    assert both.width > compare(models, [Subject("a", photo(64, 96))], ["depth"], tile=96).width


def test_a_network_without_a_backbone_is_told(tmp_path, place, capsys):
    config = replace(KINDS["mtmamba"], backbone=replace(SWIN, name="none", embed_dim=16))
    save_checkpoint(tmp_path / "headless", build_model(config, {"depth": create_task("depth")}, (64, 96)))
    text = look(capsys, "features", tmp_path / "headless", "--images", place / "photographs", "--out", tmp_path, code=1)
    assert "has no backbone and takes no image; import a checkpoint" in text
