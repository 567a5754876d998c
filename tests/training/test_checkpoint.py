"""Files of a run: whole or not at all, strict, and no pickle is run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pamm
from pamm.models.registry import build_model
from pamm.models.saved import CheckpointError, load_model
from pamm.tasks import create_task
from pamm.training.checkpoint import replace_folder, save_checkpoint
from tiny import DECODER, MODEL


def build(**changes):
    torch.manual_seed(0)
    tasks = {"semseg": create_task("semseg", classes=["a", "b", "c"]), "depth": create_task("depth")}
    return build_model(replace(MODEL, decoder=replace(DECODER, **changes)), tasks, (48, 64)).eval()


def outputs(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * 48 * 64).view(1, 3, 48, 64))


def test_save_pretrained_and_from_pretrained_give_the_same_network(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "m")
    assert {"config.json", "model.safetensors"} <= {f.name for f in (tmp_path / "m").iterdir()}
    for loaded in (pamm.MultiTaskModel.from_pretrained(tmp_path / "m"), load_model(tmp_path / "m")):
        assert not loaded.training
        assert loaded.tasks["semseg"].options()["classes"] == ["a", "b", "c"]
        assert loaded.image_size == (48, 64)
        for name, value in outputs(model).items():
            assert torch.equal(value, outputs(loaded)[name])


def test_weights_of_another_architecture_are_refused_with_what_differs(tmp_path):
    build().save_pretrained(tmp_path / "m")
    other = build(state_size=8)
    settings = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(settings | {"model": other.settings["model"]}))
    with pytest.raises(
        CheckpointError, match=r"another architecture: .* of another shape, e\.g\. decoder\.pame\.0\.A_log"
    ):
        load_model(tmp_path / "m")


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_in_place_of_weights_is_refused_and_not_run(tmp_path):
    build().save_pretrained(tmp_path / "m")
    (tmp_path / "m/model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_model(tmp_path / "m")
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="a pickle can run code"):
        load_model(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "absent"])
def test_damaged_weights_are_told(tmp_path, damage):
    build().save_pretrained(tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(CheckpointError, match="no weights at" if damage == "absent" else "not a safetensors file"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("text", ["{", "{}", '{"model": 3, "tasks": {}, "image_size": [1, 2]}', "[]"])
def test_settings_that_describe_no_model_are_told(tmp_path, text):
    build().save_pretrained(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json does not describe a pamm model"):
        load_model(tmp_path / "m")


def test_a_source_that_does_not_exist_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing at .*nothing\. Give a run folder"):
        load_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*pamm train"):
        load_model(tmp_path / "empty")


def test_a_failed_save_keeps_the_checkpoint_before_it(tmp_path):
    model = build()
    save_checkpoint(tmp_path / "last", model)
    before = outputs(load_model(tmp_path / "last"))

    def fails(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"could not save .*No space left on device.* is intact.*Free some space"):
        replace_folder(tmp_path / "last", fails)
    assert [f.name for f in tmp_path.iterdir()] == ["last"]
    for name, value in outputs(load_model(tmp_path / "last")).items():
        assert torch.equal(value, before[name])


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    save_checkpoint(tmp_path / "last", build())
    os.rename(tmp_path / "last", tmp_path / ".last.old")
    (tmp_path / ".last.new").mkdir()
    assert load_model(tmp_path).image_size == (48, 64)
    save_checkpoint(tmp_path / "last", build())
    assert [f.name for f in tmp_path.iterdir()] == ["last"]


SAVE_UNDER_A_LIMIT = """
import resource, signal, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/training"]
from test_checkpoint import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = build()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    save_checkpoint(Path({target!r}), model, {{"step": 2}})
except CheckpointError as error:
    print(error)
    sys.exit(7)
"""


def test_a_disk_that_takes_no_more_bytes_keeps_the_old_checkpoint(tmp_path):
    """The write itself fails, as on a full disk: the file size limit of a child process stands in for it."""
    model = build()
    save_checkpoint(tmp_path / "last", model)
    code = SAVE_UNDER_A_LIMIT.format(tests=str(Path(__file__).parents[1]), target=str(tmp_path / "last"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "could not save" in done.stdout and "is intact" in done.stdout
    for name, value in outputs(load_model(tmp_path / "last")).items():
        assert torch.equal(value, outputs(model)[name])
