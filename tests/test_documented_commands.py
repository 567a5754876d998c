"""Every command line in README and docs is accepted: by the command's parser, and by what shares a batch among processes."""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pamm.cli import main
from pamm.command_line import COMMANDS, parse_experiment
from pamm.config.experiment import Experiment, TrainConfig, check
from pamm.config.recipes import RECIPES, get_recipe
from pamm.config.strict import ConfigError
from pamm.data.loader import StepSampler

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*/README.md"))]
STAND_INS = {"RECIPE": "demo", "KIND": "scan", "RUN": "runs/mine", "SOURCE": "runs/mine"}
"""Words in capitals that stand for one of a few names; others stand for a file or folder."""

TRAINED_BY = {"train": [], "demo": ["demo"]}
"""Commands that train an experiment → what stands before their arguments."""


def command_lines(page: Path) -> Iterator[str]:
    """Lines of code blocks that begin with `pamm`, and commands with options within a sentence."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()
    yield from (line.strip().removeprefix("$ ") for line in lines if re.match(r"\s*(\$ )?pamm ", line))
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    spans = (" ".join(span.split()) for span in re.findall(r"`(pamm [^`]+)`", prose))
    yield from (span for span in spans if re.match(r"pamm \w+ [^-].* --\w", span) and "…" not in span)


def variants(line: str) -> Iterator[list[str]]:
    """The arguments after `pamm`, once for every alternative of a synopsis such as [--protocol bdet|seism]."""
    words = shlex.split(line.replace("[", " ").replace("]", " "), comments=True)[1:]
    for chosen in itertools.product(*(word.split("|") for word in words)):
        yield [STAND_INS.get(word, word) for word in chosen]


FOUND = sorted({(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in command_lines(page)})
COMMAND_LINES = [
    pytest.param(arguments, id=f"{page}: {' '.join(arguments)}") for page, line in FOUND for arguments in variants(line)
]


class Accepted(BaseException):
    """Ends a command whose arguments were accepted, before its work."""


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder, in which every command stops as soon as its arguments are parsed."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *arguments: object, **options: object) -> None:
        parse(self, *arguments, **options)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_data(folder: Path) -> None:
    """A data set as the README describes it, with one image a split."""
    for split in ("train", "val"):
        for kind, values in (("images", np.zeros((40, 50, 3), np.uint8)), ("semseg", np.eye(40, 50, dtype=np.uint8))):
            (folder / split / kind).mkdir(parents=True)
            Image.fromarray(values).save(folder / split / kind / "a.png")
    (folder / "dataset.yaml").write_text("tasks: {semseg: {classes: [background, cat]}}\n")


def check_shares(experiment: Experiment) -> None:
    """Whether every process gets an equal part of every step's batch."""
    settings = experiment.train
    world = settings.devices * settings.nodes
    parts = [next(iter(StepSampler(1000, settings, rank=rank, world=world))) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) * world * settings.accumulate == settings.batch


@pytest.mark.parametrize("arguments", COMMAND_LINES)
def test_a_documented_command_is_accepted(arguments, workplace, capsys):
    name, *rest = arguments
    assert name in COMMANDS
    if {"-h", "--help"} & set(rest):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    elif name in TRAINED_BY:
        if rest and rest[0].startswith("folder"):
            make_data(workplace / rest[rest.index("--data.root") + 1])
        experiment, _ = parse_experiment(name, [*TRAINED_BY[name], *rest])
        check_shares(experiment)
    elif name == "ablate":  # plans its runs, each with its settings parsed and checked
        if "--base" in rest and rest[rest.index("--base") + 1].endswith(".yaml"):
            pytest.skip("derives from a file of the reader's own")
        assert main([*arguments, "--dry-run"]) == 0, capsys.readouterr().err
    else:
        with pytest.raises(Accepted):
            main(arguments)


def test_the_pages_show_every_command():
    shown = {arguments[0] for _, line in FOUND for arguments in variants(line)}
    assert shown >= COMMANDS.keys() - {"demo", "doctor", "recipes"}


def test_options_told_in_prose_exist(capsys):
    """Every `--option` in a sentence is an option of some command, or a leaf of an experiment."""
    helps = [[name, "--help"] for name in COMMANDS.keys() - {"train", "demo", "look", "bench"}]
    helps += [["look", view, "--help"] for view in ("predictions", "features", "router", "scans")]
    helps += [
        ["bench", kind, "--help"] for kind in ("scan", "layers", "model", "train", "scaling", "data", "all", "report")
    ]
    helps += [["train", "--help"], *(["train", recipe, "--help"] for recipe in ("pascal-pamm-b", "nyud-mtmamba"))]
    known = set()
    for arguments in helps:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        known |= set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    told = {
        (page.relative_to(ROOT).as_posix(), option)
        for page in PAGES
        for span in re.findall(r"`(--[a-z][^`]*)`", page.read_text(encoding="utf-8"))
        for option in re.findall(r"(?<!\w)--[a-z][\w.-]*", span)
    }
    unknown = {(page, option) for page, option in told if option.replace("_", "-") not in known}
    assert not {(page, option) for page, option in unknown if not option.startswith("--tasks.")}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_on_one_device(recipe):
    check_shares(get_recipe(recipe))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batch": 6, "devices": 4}, ["by 4 processes", "a multiple of 4, e.g. 4 or 8", "or take 3 devices in all"]),
        ({"batch": 6, "devices": 2, "nodes": 2}, ["by 4 processes", "or take 3 devices in all"]),
        ({"batch": 3, "accumulate": 2}, ["by 1 process (", "in 2 equal parts each", "a multiple of 2, e.g. 2 or 4"]),
        ({"batch": 2, "devices": 5}, ["a multiple of 5, e.g. 5, or take 2 devices in all"]),
        ({"batch": 7, "devices": 4}, ["a multiple of 4, e.g. 4 or 8, or take 1 device in all"]),
    ],
)
def test_a_batch_that_cannot_be_shared_is_told_with_the_remedy(settings, told):
    with pytest.raises(ConfigError) as error:
        check(Experiment(train=TrainConfig(**settings)))
    assert all(text in str(error.value) for text in told), error.value


def test_the_processes_that_torchrun_starts_are_what_counts(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    check(Experiment(train=TrainConfig(batch=6, devices=4)))
    with pytest.raises(ConfigError, match="by 4 processes"):
        StepSampler(10, TrainConfig(batch=6), world=4)


def test_training_refuses_it_before_anything_is_made(tmp_path, capsys):
    arguments = ["train", "demo", "--out", str(tmp_path / "run"), "--train.devices", "3"]
    assert main(arguments) == 1
    assert "train.batch = 8 cannot be shared by 3 processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
