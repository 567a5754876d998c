"""What a user names: recipes, files, folders; and folders of one's own from the command line to the trained tasks."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pamm
from command import run_command
from data.packages import write_ids
from pamm.cli import main
from pamm.command_line import parse_experiment
from pamm.config.experiment import dump
from pamm.config.recipes import RECIPES, get_recipe
from pamm.config.strict import ConfigError
from pamm.data import DataError
from pamm.training.command import run_folder
from tiny import experiment


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """A folder of one image with semseg and depth, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for kind, values in (
            ("images", np.zeros((48, 64, 3), np.uint8)),
            ("semseg", np.zeros((48, 64), np.uint8)),
            ("depth", np.full((48, 64), 900, np.uint16)),
        ):
            (tmp_path / "mine" / split / kind).mkdir(parents=True)
            Image.fromarray(values).save(tmp_path / "mine" / split / kind / "a.png")
    (tmp_path / "mine/dataset.yaml").write_text("tasks: {semseg: {classes: [a, b]}, depth: {}}")
    return tmp_path / "mine"


@pytest.mark.parametrize("name", ["mine", "./mine", "mine/", "{tmp}/mine", "../{here}/mine"])
def test_a_folder_is_checked_by_its_name(mine, capsys, name):
    name = name.format(tmp=mine.parent, here=mine.parent.name)
    told = run_command(capsys, "data", name, "--deep", code=0)
    assert (
        "train: 1 images" in told and "semseg: 1 labels" in told and told.startswith(f"data set: folder, {Path(name)}")
    )


def test_of_a_recipe_and_a_folder_of_one_name_the_recipe_is_meant(mine, tmp_path, capsys):
    mine.rename(tmp_path / "folder-pamm")
    told = run_command(capsys, "data", "folder-pamm", code=1)
    assert "data.root is not set" in told
    assert "semseg: 1 labels" in run_command(capsys, "data", "./folder-pamm", code=0)
    assert "semseg: 1 labels" in run_command(capsys, "data", "folder-pamm", "--root", "folder-pamm", code=0)


def test_an_experiments_file_names_its_data(mine, tmp_path, capsys):
    (tmp_path / "e.yaml").write_text(f"data: {{name: folder, root: {mine}}}")
    assert "semseg: 1 labels" in run_command(capsys, "data", "e.yaml", code=0)


def test_an_experiments_options_say_how_its_labels_are_read(mine, tmp_path, capsys):
    for split in ("train", "val"):
        Image.fromarray(np.full((48, 64), 2, np.uint8)).save(mine / split / "semseg/a.png")
    assert "class index 2" in run_command(capsys, "data", "mine", "--deep", code=1)
    text = f"data: {{name: folder, root: {mine}}}\ntasks: {{semseg: {{options: {{classes: [a, b, c]}}}}}}"
    (tmp_path / "three.yaml").write_text(text)
    assert "problem" not in run_command(capsys, "data", "three.yaml", "--deep", code=0)
    (tmp_path / "wrong.yaml").write_text(text.replace("classes", "clases"))
    assert "Did you mean 'classes'" in run_command(capsys, "data", "wrong.yaml", code=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "unknown recipe 'nowhere'"),
        (["./nowhere"], "no folder ./nowhere; give a folder that holds train/images/"),
        (["folder-pam"], "Did you mean 'folder-pamm'"),
        (["mine", "--root", "mine"], "both given"),
        (["run"], "pamm data run/experiment.yaml"),
        (["mosaic-pamm"], "called 'folder-pamm' now"),
        (["empty"], "no folder in empty/train"),
    ],
)
def test_what_is_no_data_set_is_told_with_the_remedy(mine, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    dump(experiment(), tmp_path / "run/experiment.yaml")
    assert message in run_command(capsys, "data", *arguments, code=1)


def test_a_folder_in_a_recipes_place_is_told(mine, capsys):
    told = run_command(capsys, "train", "mine", code=1)
    assert "folder-pamm with --data.root mine" in told


def test_a_public_data_set_is_known_by_its_folders(tmp_path, capsys):
    write_ids(tmp_path / "NYUDv2/gt_sets/val.txt", ["0001"])
    assert "data set: nyud" in run_command(capsys, "data", tmp_path / "NYUDv2", code=1)


# -- training on a folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["folder-pamm", "folder-pamm-b", "folder-pamm+no-priors"])
def test_a_recipe_takes_the_tasks_that_the_folder_has_and_says_so(mine, capsys, recipe):
    parsed, _ = parse_experiment("train", [recipe, "--data.root", "mine"])
    assert list(parsed.tasks) == ["semseg", "depth"] and parsed.tasks["depth"] == get_recipe(recipe).tasks["depth"]
    told = capsys.readouterr().out
    assert told == "tasks: semseg, depth (mine has no labels for human_parts, sal, normals, edge)\n"


def test_tasks_that_are_asked_for_are_not_left_out(mine, tmp_path, capsys):
    parsed, _ = parse_experiment("train", ["folder-pamm", "--data.root", "mine", "--tasks", "depth"])
    assert list(parsed.tasks) == ["depth"]
    asked = ["folder-pamm", "--data.root", "mine", "--tasks", "depth,sal", "--out", tmp_path / "run"]
    assert "no labels for the task 'sal'" in run_command(capsys, "train", *asked, code=1)
    dump(parse_experiment("train", ["demo"])[0], tmp_path / "six.yaml")
    given = ["six.yaml", "--data.name", "folder", "--data.root", "mine", "--out", tmp_path / "run"]
    assert "leave it out with --tasks semseg depth" in run_command(capsys, "train", *given, code=1)


def test_a_folder_without_a_description_has_the_tasks_of_its_folders(mine):
    (mine / "dataset.yaml").unlink()
    for split in ("train", "val"):
        (mine / split / "semseg/a.png").rename(mine / split / "semseg.png")
        (mine / split / "semseg").rmdir()
    assert list(parse_experiment("train", ["folder-pamm", "--data.root", str(mine)])[0].tasks) == ["depth"]


@pytest.mark.parametrize("root", ["mine", "./mine/", "{tmp}/mine"])
def test_every_folder_has_a_run_folder_of_its_own(mine, tmp_path, capsys, root):
    arguments = ["folder-pamm", "--data.root", root.format(tmp=tmp_path)]
    assert run_folder(parse_experiment("train", arguments)[0]) == Path("runs/folder-pamm-mine")
    assert run_folder(get_recipe("nyud-pamm-b")) == Path("runs/nyud-pamm-b")


def test_a_folder_that_is_not_given_is_told():
    with pytest.raises(DataError, match=r"data\.root is not set: give the folder that holds train/images/"):
        parse_experiment("train", ["folder-pamm"])


def test_no_recipe_names_a_folder_of_somebody_elses():
    roots = {name: build().data.root for name, build in RECIPES.items()}
    assert {root for root in roots.values() if root} == {
        "~/data/PASCALContext",
        "~/data/NYUDv2",
        "~/data/cityscapes_all",
    }


def test_a_run_under_a_recipes_earlier_name_goes_on(mine, tmp_path, capsys):
    """Its experiment.yaml holds everything; the recipe of that name is not needed."""
    parsed, _ = parse_experiment("train", ["folder-pamm", "--data.root", "mine"])
    text = Path("old.yaml")
    dump(parsed, text)
    text.write_text(text.read_text().replace("name: folder-pamm", "name: mosaic-pamm"))
    loaded, _ = parse_experiment("train", ["old.yaml"])
    assert loaded.name == "mosaic-pamm" and loaded.model == parsed.model and loaded.tasks == parsed.tasks
    with pytest.raises(ConfigError, match="called 'folder-pamm' now"):
        get_recipe("mosaic-pamm+no-priors")


def test_the_public_lists():
    assert pamm.__version__ == version("pamm")
    assert pamm.list_recipes() == list(RECIPES)
    assert pamm.list_recipes("mtmamba-plus") == pamm.list_recipes("*-mtmamba-plus")
    assert "nyud-mtmamba-plus" in pamm.list_recipes("mtmamba") and "demo" not in pamm.list_recipes("mtmamba")
    assert pamm.list_recipes("nothing of this name") == []
    assert pamm.list_tasks() == ["depth", "edge", "human_parts", "normals", "sal", "semseg"]


@pytest.mark.parametrize("given", [["semseg", "depth"], ["semseg,depth"], ["semseg,", "depth"]])
def test_tasks_are_separated_by_spaces_or_commas(given):
    chosen, _ = parse_experiment("train", ["demo", "--tasks", *given, "--train.steps", "5"])
    assert list(chosen.tasks) == ["semseg", "depth"] and chosen.train.steps == 5


@pytest.mark.parametrize("option", ["--root", "--data.root"])
def test_the_folder_of_the_data_is_given_in_one_way_everywhere(option, mine, capsys):
    chosen, _ = parse_experiment("train", ["folder-pamm", option, str(mine)])
    assert chosen.data.root == str(mine)
    assert main(["data", "folder-pamm", option, str(mine)]) == 0
    assert "train: 1 images" in capsys.readouterr().out


def test_a_model_has_random_weights_unless_asked():
    """As timm's create_model: nothing is fetched by default, whatever the recipe says of training."""
    assert get_recipe("nyud-pamm-b").model.backbone.pretrained
    model = pamm.create_model("nyud-pamm-b+baseline+stages-1", device="meta")
    assert model.settings["model"]["backbone"]["pretrained"] is False
