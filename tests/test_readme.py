"""The README: Python blocks and commands run, `pamm train` up to its experiment."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pamm.cli import main
from pamm.command_line import parse_experiment
from pamm.config.experiment import DataConfig, ModelConfig, TaskConfig
from pamm.models.registry import build_model
from pamm.official.mtmamba import layout
from pamm.tasks import create_task
from pamm.training.demo import run_demo
from pamm.training.run import train
from tiny import MTMAMBA, SWIN, experiment

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(), re.M | re.S)
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith("pamm ")
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder as the README's reader has it: a demo run, some photographs, a folder data set called mine, maps of boundaries."""
    folder = tmp_path_factory.mktemp("readme")
    tiny = experiment(str(folder / "rooms"), steps=2)
    run_demo(replace(tiny, data=replace(tiny.data, size=(96, 128))), folder / "runs/demo", progress=False)
    generator = np.random.default_rng(0)
    for split in ("photographs", "mine/train/images", "mine/val/images"):
        (folder / split).mkdir(parents=True)
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / split / "a.jpg")
    for split in ("train", "val"):
        for task, values in (("semseg", np.zeros((40, 50), np.uint8)), ("depth", np.full((40, 50), 900, np.uint16))):
            (folder / f"mine/{split}/{task}").mkdir()
            Image.fromarray(values).save(folder / f"mine/{split}/{task}/a.png")
    (folder / "mine/dataset.yaml").write_text(
        "tasks: {semseg: {classes: [background, cat, dog]}, depth: {unit: millimetre}}\n"
    )
    for kind in ("maps", "truths"):
        (folder / kind).mkdir()
        Image.fromarray(np.eye(40, 50, dtype=np.uint8) * np.uint8(255)).save(folder / kind / "a.png")
    own = DataConfig(name="folder", root=str(folder / "mine"), size=(48, 64))
    train(
        replace(experiment(steps=1), tasks={"semseg": TaskConfig(), "depth": TaskConfig()}, data=own),
        folder / "runs/mine",
    )
    save_published(folder / "checkpoint.pth.tar")
    return folder


def save_published(path: Path) -> None:
    """A small MTMamba with random weights, as its authors save one."""
    model = build_model(ModelConfig(SWIN, MTMAMBA), {name: create_task(name) for name in ("semseg", "depth")}, (64, 64))
    own = model.state_dict()
    torch.save({"model": {f"module.{key}": place.collect(own) for key, place in layout(model, "mtmamba")}}, path)


def test_the_report_of_a_demo_run_is_there(workplace):
    report = (workplace / "runs/demo/report.html").read_text()
    assert "untrained" in report and "trained" in report
    for task in experiment().tasks:
        assert len(list((workplace / "runs/demo/pictures").glob(f"*_{task}_prediction.png"))) == 5


@pytest.mark.parametrize("block", [text for language, text in BLOCKS if language == "python"])
def test_python_blocks_run(block, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("arguments", [c for c in COMMANDS if c[0] == "train" and "--help" not in c], ids=" ".join)
def test_train_commands_give_an_experiment(arguments, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    settings, _ = parse_experiment("train", arguments[1:])
    assert settings.tasks


@pytest.mark.parametrize(
    "arguments", [c for c in COMMANDS if c[0] in ("predict", "data", "eval", "import", "look")], ids=" ".join
)
def test_other_commands_run(arguments, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    assert main(arguments) == 0, capsys.readouterr()


def test_every_kind_of_command_is_shown():
    assert {"predict", "data", "train", "eval", "import", "look"} <= {command[0] for command in COMMANDS}
