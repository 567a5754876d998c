"""The configuration: strict, complete, written and read without loss."""

import subprocess
import sys

import pytest

from pamm.config.experiment import Experiment, TaskConfig, check, dump, load
from pamm.config.recipes import RECIPES, VARIANTS, get_recipe
from pamm.config.strict import ConfigError, from_dict, to_dict


@pytest.mark.parametrize("name", [*RECIPES, *(f"pascal-pamm-b+{v}" for v in VARIANTS)])
def test_every_recipe_survives_its_file(name, tmp_path):
    experiment = get_recipe(name)
    dump(experiment, tmp_path / "experiment.yaml")
    assert load(tmp_path / "experiment.yaml") == experiment
    assert experiment.name == name


def test_every_variant_changes_the_experiment():
    base = get_recipe("pascal-pamm-b").model
    derived = [get_recipe(f"pascal-pamm-b+{v}").model for v in VARIANTS]
    assert all(model != base for model in derived)
    assert len(set(derived)) == len(derived)


@pytest.mark.parametrize(
    ("recipe", "facts"),
    [
        ("pascal-pamm-l", {"data.size": [512, 512], "model.decoder.state_size": 64, "train.lr": 2e-5}),
        ("pascal-pamm-b", {"model.backbone.out_indices": [2, 5, 8, 11], "tasks.edge.options.positive_weight": 0.95}),
        ("nyud-pamm-l", {"data.size": [448, 576], "model.backbone.out_indices": [5, 11, 17, 23], "train.lr": 1e-5}),
        (
            "nyud-pamm-b",
            {"model.decoder.state_size": 16, "tasks.edge.options.positive_weight": 0.88, "train.clip": 10.0},
        ),
    ],
)
def test_recipes_hold_the_papers_settings(recipe, facts):
    shared = {
        "train.steps": 40_000,
        "train.batch": 6,
        "train.optimizer": "adam",
        "train.weight_decay": 1e-6,
        "train.power": 0.9,
        "model.decoder.experts.count": 15,
        "model.decoder.experts.top_k": 9,
        "tasks.normals.weight": 10.0,
        "tasks.edge.weight": 50.0,
    }
    for path, expected in (shared | facts).items():
        node = to_dict(get_recipe(recipe))
        for key in path.split("."):
            node = node[key]
        assert node == expected, path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, r"unknown key 'trian'\. Did you mean 'train'\? Known keys: name, tasks, data, model, train"),
        ({"train": {"step": 3}}, r"unknown key 'train\.step'\. Did you mean 'steps'"),
        ({"train": {"steps": "many"}}, r"train\.steps: found 'many' \(str\), expected int"),
        ({"train": {"steps": True}}, r"train\.steps: found True \(bool\), expected int"),
        ({"data": {"size": [512]}}, r"data\.size: found 1 values \[512\], expected 2"),
        (
            {"model": {"decoder": {"system": "pam"}}},
            r"model\.decoder\.system: found 'pam', expected one of 'pamm', .*Did you mean 'pamm'",
        ),
        ({"tasks": {"edge": {"weight": "x"}}}, r"tasks\.edge\.weight: found 'x' \(str\), expected float"),
        ({"model": [1]}, r"model\.?: expected a mapping"),
    ],
)
def test_a_wrong_configuration_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Experiment, values)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("train", key, -1) for key in ("steps", "batch", "accumulate", "lr", "weight_decay", "warmup", "clip")),
        *(("train", key, 0) for key in ("steps", "batch", "accumulate", "clip", "save_every", "log_every", "devices")),
        *(("train", key, -1) for key in ("eval_every", "workers", "seed", "nodes")),
        ("data", "size", [0, 512]),
        ("data", "flip", 2),
        ("model", "decoder", {"orders": 9}),
        ("model", "decoder", {"state_size": 0}),
        ("model", "decoder", {"experts": {"rank": 0}}),
        ("model", "backbone", {"drop_path_rate": 2}),
        ("tasks", "edge", {"weight": -1}),
    ],
)
def test_a_number_out_of_range_is_named(section, key, value):
    with pytest.raises(ConfigError, match=rf"{section}\.{key}.*: found .*, expected a number (at least|from)"):
        check(from_dict(Experiment, {section: {key: value}}))


def test_a_number_without_a_point_is_read_as_meant(tmp_path):
    (tmp_path / "e.yaml").write_text("train: {lr: 1e-5}")
    assert load(tmp_path / "e.yaml").train.lr == 1e-5


def test_an_empty_file_is_told_by_name(tmp_path):
    (tmp_path / "e.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"e\.yaml: Experiment: expected a mapping"):
        load(tmp_path / "e.yaml")


def test_whole_numbers_are_accepted_where_a_real_one_is_meant():
    assert from_dict(TaskConfig, {"weight": 2}).weight == 2.0


@pytest.mark.parametrize("text", ["a: [1", "\tname: x", "train: {steps: 1}\ntrain: {lr: 1}"])
def test_a_broken_file_is_told(text, tmp_path):
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(ConfigError, match="not a readable YAML file"):
        load(tmp_path / "e.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pascal-pam-b", "Did you mean 'pascal-pamm-b'"),
        ("demo+no-prior", "Did you mean 'no-priors'"),
        ("", "unknown recipe ''"),
        ("demo+stages-2", "changes nothing in 'demo'"),
    ],
)
def test_an_unknown_recipe_is_told(name, message):
    with pytest.raises(ConfigError, match=message):
        get_recipe(name)


def test_configuration_imports_no_torch():
    code = "import sys, pamm.config.experiment, pamm.config.recipes, pamm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
