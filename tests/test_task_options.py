"""Options of tasks: every one reaches its task from a file and from the command line, and is refused where it means nothing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import yaml
from PIL import Image

from command import run_command
from pamm.build import create_tasks, label_options
from pamm.command_line import parse_experiment
from pamm.config.experiment import DataConfig, Experiment, TaskConfig, dump, load
from pamm.config.strict import ConfigError
from pamm.data import open_dataset
from pamm.evaluation.evaluate import evaluate_saved
from pamm.look.subjects import from_dataset
from pamm.runtime.distributed import launch
from pamm.tasks import TASKS, create_task, option_defaults
from pamm.training.run import train
from tiny import experiment

OTHERS = {
    "classes": ["sky", "tree", "3"],
    "unit": "metre",
    "limit": 10,
    "maximum": 20,
    "soft": True,
    "positive_weight": 0.5,
    "protocol": "seism",
    "max_distance": 0.011,
    "outline": True,
}
"""A value of every option, other than its default."""

EVERY = [(task, option) for task in TASKS for option in option_defaults(task) if option != "weight"]


def of(task: str, **options: object) -> Experiment:
    return Experiment(tasks={task: TaskConfig(1.0, options)}, data=DataConfig(name="synthetic", images=(1, 1)))


@pytest.mark.parametrize(("task", "option"), EVERY)
def test_an_option_reaches_its_task_from_a_file_and_survives_the_runs_file(tmp_path, task, option):
    value = OTHERS[option]
    given = {"tasks": {task: {"options": {option: value}}}, "data": {"name": "synthetic", "images": [1, 1]}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(given))
    own = load(tmp_path / "mine.yaml")
    built = create_tasks(own)[task]
    assert built.options()[option] == value != create_task(task).options().get(option)
    dump(own, tmp_path / "experiment.yaml")
    assert load(tmp_path / "experiment.yaml") == own
    assert create_task(task, **built.options()).options() == built.options()


@pytest.mark.parametrize(("task", "option"), EVERY)
@pytest.mark.parametrize("style", ["words", "equals", "dashes"])
def test_an_option_reaches_its_task_from_the_command_line(task, option, style):
    value = OTHERS[option]
    words = value if isinstance(value, list) else [str(value)]
    name = f"--tasks.{task}.options.{option}"
    if style == "dashes":
        name = name.replace("_", "-")
    if style == "equals":
        words = [f"{name}={json.dumps(value)}"]
    arguments = words if style == "equals" else [name, *words]
    parsed, _ = parse_experiment("train", ["demo", *arguments, "--train.steps", "3"])
    assert parsed.train.steps == 3
    assert create_tasks(parsed)[task].options()[option] == value
    kept = create_tasks(parse_experiment("train", ["demo"])[0])
    assert {n: t.options() for n, t in create_tasks(parsed).items() if n != task} == {
        n: t.options() for n, t in kept.items() if n != task
    }


WRONG = {
    "positive_weight": ["x", True, [0.5], math.nan, 1.5],
    "protocol": [1, True, "bsd", ["bdet"]],
    "max_distance": ["near", True, math.inf, 2],
    "outline": ["yes please", 1, "True", [True]],
    "unit": [True, "inch", ["metre"]],
    "limit": ["far", True, [10], 0, -1, math.inf, math.nan],
    "maximum": ["far", True, [10], 0, -1, math.inf, math.nan],
    "soft": ["yes please", 1, [True]],
    "classes": ["sky", 3, ["sky"], ["sky", "sky"], ["sky", 3]],
}


@pytest.mark.parametrize(
    ("task", "option", "value"), [(task, option, value) for task, option in EVERY for value in WRONG[option]]
)
def test_a_wrong_value_is_refused_by_name(tmp_path, capsys, task, option, value):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"tasks": {task: {"options": {option: value}}}}))
    told = run_command(capsys, "train", tmp_path / "mine.yaml", "--out", tmp_path / "run", code=1)
    assert f"tasks.{task}" in told and option in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tasks.edge.options.protocl", "seism"],
            "no option 'protocl'. Did you mean 'protocol'? Its options: positive_",
        ),
        (["--tasks.sal.options.outline", "true"], "task 'sal' has no option 'outline'"),
        (["--tasks.edge.options.weight", "3"], r"set tasks.edge.weight"),
        (["--tasks.dept.options.unit", "metre"], "'dept' is none of this experiment's tasks: semseg, depth"),
        (["--tasks.edge.options.protocol"], "expected --tasks.edge.options.protocol VALUE"),
        (["--tasks.edge.options", "protocol", "seism"], "expected --tasks.edge.options.OPTION VALUE"),
        (["--tasks.edge.options.protocol", "--train.steps", "3"], "expected --tasks.edge.options.protocol VALUE"),
        (["--tasks.edge.options.protocol", "{a: 1}"], "protocol is {'a': 1}, expected a text"),
    ],
)
def test_a_wrong_option_on_the_command_line_is_told(capsys, arguments, message):
    assert message in run_command(capsys, "train", "demo", *arguments, code=1)


def test_an_unknown_task_and_a_nested_option_in_a_file_are_told(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("tasks: {dept: {}}")
    assert "unknown task 'dept'; known tasks: depth" in run_command(capsys, "train", tmp_path / "a.yaml", code=1)
    (tmp_path / "b.yaml").write_text("tasks: {edge: {options: {protocol: {a: 1}}}}")
    assert "tasks.edge.options.protocol: found {'a': 1}" in run_command(capsys, "train", tmp_path / "b.yaml", code=1)


def test_numbers_without_a_point_are_read_as_meant(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "tasks: {edge: {options: {max_distance: 1e-3}}}\ndata: {name: synthetic, images: [1, 1]}"
    )
    assert create_tasks(load(tmp_path / "a.yaml"))["edge"].max_distance == 0.001


def test_help_lists_the_options_with_their_values(capsys):
    told = run_command(capsys, "train", "nyud-pamm-b", "--help", code=0)
    for text in ("positive_weight (0.88)", "protocol (bdet)", "unit (millimetre)", "--tasks.TASK.options.OPTION"):
        assert text in told


# -- one merge for training, evaluation and looking -------------------------------------------------------------------------


@pytest.fixture
def metres(tmp_path) -> Experiment:
    """A folder whose depth PNGs hold whole metres, 3 everywhere, which only the experiment says; edges are outlines."""
    root = tmp_path / "metres"
    for split in ("train", "val"):
        for kind, picture in (
            ("images", np.zeros((48, 64, 3), np.uint8)),
            ("depth", np.full((48, 64), 3, np.uint16)),
            ("edge", np.kron(np.eye(2, dtype=np.uint8), np.full((24, 32), 255, np.uint8))),
        ):
            (root / split / kind).mkdir(parents=True)
            Image.fromarray(picture).save(root / split / kind / "a.png")
    (root / "dataset.yaml").write_text("tasks: {depth: {unit: millimetre}, edge: {max_distance: 0.005}}")
    tasks = {
        "depth": TaskConfig(1.0, {"unit": "metre"}),
        "edge": TaskConfig(1.0, {"protocol": "seism", "max_distance": 0.02}),
    }
    return Experiment(tasks=tasks, data=DataConfig(name="folder", root=str(root), size=(48, 64)))


def test_options_of_the_experiment_come_before_those_of_the_data(metres):
    assert label_options(metres)["edge"] == {"protocol": "seism", "max_distance": 0.02}
    assert label_options(Experiment(data=metres.data))["edge"] == {"max_distance": 0.005}


def test_training_evaluation_and_looking_read_and_measure_labels_alike(metres, tmp_path):
    tasks = create_tasks(metres)
    assert open_dataset(metres.data, "val", tasks)[0].labels["depth"].unique().tolist() == [3.0]
    assert from_dataset(metres, tasks)[0].truths["depth"].max() == 3.0
    settings = Experiment("mine", metres.tasks, metres.data, experiment().model, experiment(steps=1, batch=1).train)
    trained = train(settings, tmp_path / "run", progress=False)
    assert (
        1.5 < trained.row["depth"]["RMSE"] < 4.5
    )  # of an untrained network; 0.003 if the metres were read as millimetres
    options = {"resolutions": ("frame",), "workers": 0}
    [(_, measured)], own = evaluate_saved(str(tmp_path / "run"), launch(settings.train), **options)
    assert measured.row == trained.row
    assert own["edge"].options()["protocol"] == "seism"


def test_a_task_that_a_folder_lacks_is_told_with_the_remedy(metres):
    lacking = Experiment(tasks={**metres.tasks, "sal": TaskConfig()}, data=metres.data)
    with pytest.raises(ConfigError, match=r"no labels for the task 'sal'; it has: depth, edge; .*--tasks depth edge"):
        create_tasks(lacking)


def test_a_file_of_the_data_with_wrong_options_is_told(metres, capsys):
    path = f"{metres.data.root}/dataset.yaml"
    with open(path, "w") as file:
        file.write("tasks: {depth: {}, edge: {outline: 'no'}}")
    assert "outline is 'no', expected true or false" in run_command(
        capsys, "data", "folder-pamm", "--root", metres.data.root, code=1
    )
