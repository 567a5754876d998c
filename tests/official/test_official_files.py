"""Files that are no checkpoint: told, and nothing in them executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pamm import official
from pamm.official import OfficialError


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["plain", "inside", "old"])
def test_a_malicious_pickle_is_refused_and_not_run(form, tmp_path):
    path, ran = tmp_path / "checkpoint.pth", tmp_path / "ran"
    if form == "plain":
        path.write_bytes(pickle.dumps(Bomb(ran), protocol=2))
    else:
        content = {"model": {"backbone.norm.weight": torch.ones(3)}, "epoch": Bomb(ran)}
        torch.save(content, path, _use_new_zipfile_serialization=form == "inside")
    with pytest.raises(OfficialError, match=r"asks for \w+\.system, .*nothing of it was executed"):
        official.load(path)
    assert not ran.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "flipped", "protocol 4", "absent", "folder"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_told(damage, suffix, tmp_path):
    path = tmp_path / f"checkpoint{suffix}"
    tensors = {"backbone.norm.weight": torch.arange(5000.0)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "absent":
        contents = {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "noise": bytes(range(256)) * 9,
            "flipped": bytes(255 - byte for byte in content[:200]) + content[200:],
            "protocol 4": pickle.dumps({"a": 1}, protocol=4),
        }
        path.write_bytes(contents[damage])
    message = "no file at" if damage in ("absent", "folder") else r"is damaged|is a int, expected only tensors"
    with pytest.raises(OfficialError, match=message):
        official.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"conv1.weight": torch.ones(3)},
            r"of no published system known here \(.*pamm-released.*\); they begin with conv1",
        ),
        ({}, "begin with nothing"),
        ({"model": {"a": [1, 2]}}, r"the entry 'a' is a list, expected only tensors"),
        ([torch.ones(3)], "holds a list, expected tensors by name"),
        (
            {"model": {"module.a": torch.tensor([1.0, float("nan")])}},
            r"'module\.a' holds numbers that are not finite: .*download",
        ),
        ({"a": torch.ones(2, dtype=torch.complex64)}, r"'a' is torch\.complex64 of layout .*, expected a plain tensor"),
        (
            {"a": torch.eye(3).to_sparse()},
            r"'a' is torch\.float32 of layout torch\.sparse_coo, expected a plain tensor",
        ),
    ],
)
def test_foreign_files_are_told(content, message, tmp_path):
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(OfficialError, match=message):
        official.load(tmp_path / "checkpoint.pth")


def test_a_file_of_other_objects_is_told(tmp_path):
    torch.save({"model": {}, "config": Path("x")}, tmp_path / "checkpoint.pth")
    with pytest.raises(OfficialError, match=r"asks for pathlib.*save only its weights"):
        official.load(tmp_path / "checkpoint.pth")
