"""Saved models: from folders and from the Hub, with wrappers' names, for other users, and what is said where there is none."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pamm
from data.packages import as_user
from models.hub import serve
from pamm.models.saved import CheckpointError, load_model, load_weights
from pamm.training.checkpoint import save_checkpoint
from prediction.networks import create


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    create("pamm").save_pretrained(folder)
    return folder


def renamed(saved: Path, folder: Path, rename, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """The saved model in another folder, with other names of its weights."""
    folder.mkdir()
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    weights = load_file(saved / "model.safetensors")
    save_file({rename(key): value for key, value in weights.items()} | (extra or {}), folder / "model.safetensors")
    return folder


def assert_same(model: torch.nn.Module, saved: Path) -> None:
    expected = load_file(saved / "model.safetensors")
    assert {key: value.tolist() for key, value in model.state_dict().items()} == {
        key: value.tolist() for key, value in expected.items()
    }


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"module.{key}",
        lambda key: f"model.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"model.module._orig_mod.{key}",
        lambda key: f"module.model.model._orig_mod.{key}",
        lambda key: key.replace("heads.", "heads._orig_mod.").replace("decoder.", "decoder._fsdp_wrapped_module."),
    ],
    ids=["DDP", "Lightning", "compiled", "three", "four", "parts"],
)
def test_wrappers_names_are_taken_off_and_told(saved, tmp_path, rename):
    folder = renamed(saved, tmp_path / "m", rename)
    with pytest.warns(UserWarning, match=r"names of weights were taken without their wrapper's parts, e\.g\. '"):
        model = load_model(folder)
    assert_same(model, saved)


def test_two_weights_of_one_name_are_refused(saved, tmp_path):
    one = {"heads.depth.predict.bias": torch.zeros(1)}
    folder = renamed(saved, tmp_path / "m", lambda key: f"module.{key}", one)
    with pytest.raises(CheckpointError, match=r"two weights of one name: .*module\.heads\.depth\.predict\.bias"):
        load_model(folder)
    folder = renamed(saved, tmp_path / "n", lambda key: f"ema.{key}")
    with pytest.raises(CheckpointError, match=r"another architecture: .*ema\."):
        load_model(folder)


@pytest.mark.filterwarnings("error")
def test_a_compiled_model_is_saved_under_its_own_names(saved, tmp_path):
    model = load_model(saved)
    torch.compile(model).save_pretrained(tmp_path / "whole")
    model.heads["depth"] = torch.compile(model.heads["depth"])
    model.save_pretrained(tmp_path / "part")
    load_weights(model, saved / "model.safetensors")
    for name in ("whole", "part"):
        assert_same(load_model(tmp_path / name), saved)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002], ids=oct)
def test_files_of_a_model_have_the_umasks_mode(tmp_path, mask):
    previous = os.umask(mask)
    try:
        create("pamm").save_pretrained(tmp_path / "saved")
        save_checkpoint(tmp_path / "run" / "last", create("pamm"), {"step": 1})
    finally:
        os.umask(previous)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"model.safetensors", "config.json", "training.pt"} <= {path.name for path in files}
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {oct(0o666 & ~mask)}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", ""], ids=["weights", "settings", "folder"])
def test_what_may_not_be_read_is_told_as_that(tmp_path, name):
    create("pamm").save_pretrained(tmp_path / "model")
    with as_user(tmp_path):
        (tmp_path / "model" / name).chmod(0)
        try:
            with pytest.raises(CheckpointError, match=r"may not be read: change its permissions"):
                load_model(tmp_path / "model")
        finally:
            (tmp_path / "model" / name).chmod(0o700)


# -- the Hub ---------------------------------------------------------------------------------------------------------------

LOAD = """
import sys
sys.path[:0] = [{source!r}]
import pamm
from pamm.models.saved import CheckpointError
for name in sys.argv[1:]:
    for load in (pamm.load_model, pamm.MultiTaskModel.from_pretrained):
        try:
            print("loaded", sum(p.numel() for p in load(name).parameters()))
        except CheckpointError as error:
            print("told", error)
"""


def loading(folder: Path, environment: dict[str, str], *names: str) -> list[str]:
    """A line for each name and way to load it, from a process in `folder`."""
    code = LOAD.format(source=str(Path(pamm.__file__).parents[1]))
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_name_of_the_hub_is_fetched_and_a_mistyped_path_asks_nobody(saved, tmp_path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "readme.md").touch()
    with serve({"tester/model": saved, "runs/dmeo": saved, "tester/other": tmp_path / "other"}) as hub:
        environment = hub.environment(tmp_path / "home")
        wrong = loading(tmp_path, environment, "runs/dmeo", "runs/deep/dmeo", "./tester/model", "dmeo", "hf:x", "a b/c")
        assert hub.requests == [] and len(wrong) == 12
        for line in wrong[:2]:
            assert f"nothing at {tmp_path}/runs/dmeo (did you mean runs/demo?)." in line
            assert "was not asked, since 'runs' stands here: a repository of this name is hf:runs/dmeo" in line
        assert all(line.startswith("told") and "hf:owner/name" in line for line in wrong[2:])
        names = ("tester/model", "hf:tester/model", "hf:runs/dmeo", "tester/absent", "tester/other")
        *fetched, absent, _, foreign, _ = loading(tmp_path, environment, *names)
        assert len(fetched) == 6 and len(set(fetched)) == 1 and fetched[0].startswith("loaded")
        assert any(request.startswith("tester/model/resolve") for request in hub.requests)
        assert f"no folder here, and the Hugging Face Hub (http://127.0.0.1:{hub.port}) did not give it" in absent
        assert "holds no config.json and no model.safetensors" in foreign
    (again, _, gone, _) = loading(tmp_path, environment, "tester/model", "tester/absent")
    assert again == fetched[0], "what was fetched is kept"
    assert gone.startswith("told 'tester/absent' is no folder here")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a place where not even root can write: /proc")
def test_without_a_home_the_hubs_models_are_kept_in_a_temporary_folder(saved, tmp_path):
    (tmp_path / "file").touch()
    with serve({"tester/model": saved}) as hub:
        environment = hub.environment(Path("/proc/none")) | {"HOME": str(tmp_path / "file")}
        environment["XDG_CACHE_HOME"] = environment["HOME"]
        lines = loading(tmp_path, environment, "tester/model")
    assert len(lines) == 2 and all(line.startswith("loaded") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


DRAW_WITHOUT = """
from torch import full, nn
from pamm.models.registry import WithoutDraws
with WithoutDraws():
    for name in ("trunc_normal_", "normal_", "uniform_", "kaiming_normal_", "xavier_uniform_"):
        getattr(nn.init, name)(full((8, 8), 1e9), **({"std": 0.02} if name == "trunc_normal_" else {}))
"""


@pytest.mark.slow
def test_a_build_without_draws_ends_whatever_fresh_memory_holds():
    """`trunc_normal_` draws again until all values lie within its bounds."""
    command = [sys.executable, "-c", DRAW_WITHOUT]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0
