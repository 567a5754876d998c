"""The command in terminals and pipes of every kind: encodings, names that are no text, readers that close, full disks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pamm
from command import run_command
from pamm.command_line import COMMANDS
from pamm.training.run import train
from tiny import experiment

SOURCE = str(Path(pamm.__file__).parents[1])
ODD = os.fsdecode(b"caf\xe9 \x1b[31mred\xe2\x86\x92.png")
"""A name with a byte that is no UTF-8, an escape character and an arrow."""

ENCODINGS = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "strict": {"PYTHONIOENCODING": "utf-8:strict"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def of_these(usual: list[str]) -> list:
    """Every encoding; those that are not `usual` are left out by `make test`."""
    return [pytest.param(name, marks=() if name in usual else pytest.mark.exhaustive) for name in ENCODINGS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(experiment(str(folder / "rooms"), steps=2), folder / "run", progress=False)
    return folder / "run"


def started(*arguments: object, **environment: str) -> dict[str, object]:
    given = ("PYTHONIOENCODING", "LC_ALL", "PYTHONUTF8", "PYTHONUNBUFFERED")
    inherited = {key: value for key, value in os.environ.items() if key not in given}
    return {
        "args": [sys.executable, "-m", "pamm", *(os.fspath(str(argument)) for argument in arguments)],
        "env": inherited | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"} | environment,
    }


def run_pamm(*arguments: object, code: int = 0, **environment: str) -> tuple[bytes, bytes]:
    done = subprocess.run(**started(*arguments, **environment), capture_output=True, check=False, timeout=300)
    assert done.returncode == code, done.stderr.decode(errors="replace")
    assert b"Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("encoding", of_these(["cp1252", "C"]))
def test_predictions_are_kept_and_told_in_any_encoding(trained, tmp_path, encoding):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(photos / ODD)
    (photos / ODD.replace("png", "jpg")).write_bytes(b"no picture")
    out = tmp_path / os.fsdecode(b"\xff\x1b out")
    said = run_pamm(
        "predict", trained, photos, "--out", out, "--device", "cpu", "--formats", "png", code=1, **ENCODINGS[encoding]
    )
    assert b"1 of 2 images" in said[0] and b"failed: " in said[1]
    for text in said:
        assert b"\x1b" not in text and rb"\x1b" in text and b"\xff" not in text
    assert len(list(out.rglob("caf*.png"))) == 6


@pytest.mark.slow
@pytest.mark.parametrize("encoding", of_these(["C"]))
def test_results_are_kept_and_printed_in_any_encoding(trained, tmp_path, encoding):
    scores = tmp_path / "scores.json"
    said = run_pamm("eval", trained, "--device", "cpu", "--out", scores, **ENCODINGS[encoding])
    assert json.loads(scores.read_text())["results"] and b"mIoU" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", of_these(["strict"]))
def test_boundaries_of_any_name_are_kept_and_printed(tmp_path, encoding):
    line = np.zeros((30, 40), np.uint8)
    line[15, 5:35] = 255
    for folder in ("maps", "truths"):
        (tmp_path / folder).mkdir()
        Image.fromarray(line).save(tmp_path / folder / ODD)
    scores = tmp_path / "scores.json"
    said, _ = run_pamm("boundary", tmp_path / "maps", tmp_path / "truths", "--out", scores, **ENCODINGS[encoding])
    assert rb"caf\xe9 \x1b[31mred" in said and json.loads(scores.read_text())["ODS"]["F"] == 1


HELP = [(*command.split(), "--help") for command in ("", *COMMANDS, "train demo")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["recipes"], {"PYTHONUNBUFFERED": "1"}),
        (HELP[-1], {}),
        *(
            pytest.param(command, environment, marks=pytest.mark.exhaustive)
            for command in HELP[:-1]
            for environment in ({}, {"PYTHONUNBUFFERED": "1"})
        ),
    ],
    ids=str,
)
def test_a_reader_that_has_enough_is_no_error(arguments, environment):
    process = subprocess.Popen(**started(*arguments, **environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) in (0, 141) and said == b""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}], ids=str)
def test_an_output_that_cannot_be_written_is_one_line(environment):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            **started("recipes", **environment),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            timeout=120,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == "pamm: standard output cannot be written (No space left on device)\n"


def test_what_a_terminal_would_obey_is_escaped_in_messages(tmp_path, capsys):
    name = "\x1b]0;owned\x07\u202e"
    for arguments in (("train", name), ("predict", name, tmp_path / name), ("eval", name), (name,)):
        said = run_command(capsys, *arguments, code=2 if arguments == (name,) else 1)
        assert not {"\x1b", "\x07", "\u202e"} & set(said) and r"\x1b" in said


def test_a_page_shows_what_cannot_be_shown_as_escapes(tmp_path):
    from pamm.drawing.page import write_report

    page = write_report(tmp_path, title=f"<b>{ODD}\x07", rows=[], tasks={}, protocol="").read_text(encoding="utf-8")
    assert r"<h1>&lt;b&gt;caf\xe9 \x1b[31mred→.png\x07</h1>" in page
