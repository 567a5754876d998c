"""docs/extending.md: its six files add a task, a data set, a scan curve, an engine, a family of backbones and a decoder."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pamm
from pamm.cli import main
from pamm.command_line import parse_experiment
from pamm.config.experiment import load
from pamm.config.strict import ConfigError
from pamm.data import DATASETS, open_dataset
from pamm.models import backbone, registry
from pamm.nn import serialize
from pamm.ops.selective_scan import ENGINES, choose, explain
from pamm.tasks import TASKS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
FILES = {
    text.splitlines()[0].removeprefix("# "): text
    for text in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
}
(YAML,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
REGISTRIES = (
    TASKS,
    DATASETS,
    serialize.CURVES,
    serialize.MOST_ORDERS,
    ENGINES,
    backbone.FAMILIES,
    registry.DECODERS,
)


@pytest.fixture
def extended(tmp_path, monkeypatch) -> Iterator[Path]:
    """The page's files are in a folder of their own, and imported; afterwards nothing of them is registered."""
    before = [dict(known) for known in REGISTRIES]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    files = {name: text for name, text in FILES.items() if "/" not in name}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        importlib.import_module(name.removesuffix(".py"))
    (tmp_path / "own.yaml").write_text(YAML)
    yield tmp_path
    for known, kept in zip(REGISTRIES, before, strict=True):
        known.clear()
        known.update(kept)
    for name in files:
        del sys.modules[name.removesuffix(".py")]


def test_the_page_has_a_file_for_each_of_the_six():
    assert list(FILES) == [
        "brightness.py",
        "cases/brightness.py",
        "stripes.py",
        "columns.py",
        "definition.py",
        "patches.py",
        "mean.py",
    ]


def test_an_experiment_of_the_six_is_trained_evaluated_and_used(extended, capsys):
    assert main(["train", "own.yaml", "--out", "run", "--quiet"]) == 0
    assert "MAE" in capsys.readouterr().out
    assert (
        main(["eval", "run", "--device", "cpu", "--workers", "0", "--resolution", "frame", "--out", "scores.json"]) == 0
    )
    assert '"MAE"' in (extended / "scores.json").read_text()
    assert main(["data", "own.yaml"]) == 0
    maps = pamm.Predictor("run", device="cpu")(np.zeros((40, 50, 3), np.uint8))
    assert maps["brightness"].shape == (40, 50)
    model = pamm.load_model("run")
    assert type(model.backbone).__name__ == "Patches" and type(model.decoder).__name__ == "MeanDecoder"


def test_a_new_curve_orders_pamms_scan(extended):
    experiment = load(extended / "own.yaml")
    (extended / "pamm.yaml").write_text(
        YAML.replace("{system: mean, width: 16}", "{system: pamm, width: 32, state_size: 2, scan: columns, orders: 2}")
    )
    given = load(extended / "pamm.yaml")
    assert given == replace(experiment, model=given.model)
    model = pamm.create_model(given).eval()
    sample = open_dataset(given.data, "val", model.tasks)[0]
    with torch.no_grad():
        outputs = model(sample.image[None] / 255)
    assert outputs["brightness"].shape == (1, 1, 32, 48)
    assert serialize.scan_orders("columns", 2, 3, 1).tolist() == [[0, 3, 1, 4, 2, 5]]


def test_a_new_engine_is_chosen_by_name(extended, monkeypatch):
    torch.manual_seed(0)
    x, delta = torch.randn(2, 1, 6, 4), torch.randn(2, 1, 6, 4)
    B, C = torch.randn(2, 1, 6, 3), torch.randn(2, 1, 6, 3)
    given = (
        x,
        delta,
        -torch.rand(2, 4, 3),
        B,
        C,
        torch.rand(2, 4),
        torch.stack([torch.arange(6), torch.arange(6).flip(0)]),
    )
    expected = pamm.selective_scan(*given)
    torch.testing.assert_close(pamm.selective_scan(*given, engine="definition"), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setenv("PAMM_SCAN_ENGINE", "definition")
    assert choose("cpu", torch.float32) == "definition"
    assert [row.engine for row in explain()][-2:] == ["definition", "reference"]


def test_options_reach_the_settings_of_a_new_decoder(extended):
    experiment, _ = parse_experiment(
        "train", ["own.yaml", "--model.decoder.width", "8", "--model.backbone.embed-dim", "16"]
    )
    assert experiment.model.decoder.width == 8 and experiment.model.backbone.embed_dim == 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data.name", "stripe"], r"data\.name: found 'stripe', expected one of .*'stripes'.*Did you mean 'stripes'"),
        (["--model.backbone.name", "patch"], r"timm knows no model 'patch'; .*other families: patches\*"),
    ],
)
def test_unknown_names_are_told_with_the_known(given, message, extended):
    with pytest.raises(ConfigError, match=message):
        pamm.create_model(parse_experiment("train", ["own.yaml", *given])[0])


def test_an_unknown_decoder_is_told_with_the_known(extended):
    path = extended / "wrong.yaml"
    path.write_text(YAML.replace("system: mean", "system: meen"))
    with pytest.raises(
        ConfigError, match=r"decoder\.system: found 'meen', expected one of .*'mean'.*Did you mean 'mean'"
    ):
        load(path)


def test_the_contract_tests_find_a_new_task(tmp_path):
    """pytest imports the task's file (`-p`) before it collects; what suits the task stands in cases/ beside it."""
    (tmp_path / "cases").mkdir()
    for name in ("brightness.py", "cases/brightness.py"):
        (tmp_path / name).write_text(FILES[name])
    contract = PAGE.parents[1] / "tests" / "tasks" / "test_task_contract.py"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "brightness",
            "-p",
            "no:cacheprovider",
            "-k",
            "brightness",
            contract,
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0 and passed and int(passed[1]) > 30, run.stdout[-3000:] + run.stderr[-2000:]


def test_an_unknown_curve_is_told_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo", "--model.decoder.scan", "hilbart", "--out", "run"]) == 1
    assert "model.decoder.scan: found 'hilbart', expected one of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
