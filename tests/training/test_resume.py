"""What a run goes on from: a state that does not fit is refused before anything is written, a log is put in order."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pamm.ablate.runs import Plan, Run, train_all
from pamm.ablate.tables import TABLES
from pamm.config.experiment import DataConfig, TaskConfig
from pamm.config.strict import ConfigError
from pamm.data import DataError
from pamm.models.saved import CheckpointError, load_model
from pamm.training.lock import FolderInUseError, FolderLock
from pamm.training.loop import Loop
from pamm.training.run import create_loop, train
from tiny import experiment


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("synthetic"))


def one_task(rooms, **train):
    settings = experiment(rooms, **({"steps": 2, "save_every": 1, "batch": 2} | train))
    return dataclasses.replace(settings, tasks={"depth": TaskConfig()})


@pytest.fixture(scope="module")
def finished(rooms, tmp_path_factory) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(one_task(rooms), folder, progress=False)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def edit(name):
    """A change of one tensor of the optimizer's state of the first parameter, or of the whole state."""
    first = lambda saved: saved["optimizer"]["state"][0]  # noqa: E731
    wider = torch.zeros(1 << 12)
    edits = {
        "shorter": lambda s: first(s).update(exp_avg=torch.zeros(1)),
        "longer": lambda s: first(s).update(exp_avg=wider),
        "no number": lambda s: first(s).update(exp_avg=torch.full_like(first(s)["exp_avg"], torch.nan)),
        "negative": lambda s: first(s).update(exp_avg_sq=-torch.ones_like(first(s)["exp_avg"])),
        "another type": lambda s: first(s).update(exp_avg_sq=first(s)["exp_avg_sq"].double()),
        "integers": lambda s: first(s).update(exp_avg_sq=first(s)["exp_avg_sq"].long()),
        "expanded": lambda s: first(s).update(exp_avg=torch.zeros(1).expand(first(s)["exp_avg"].shape)),
        "sparse": lambda s: first(s).update(exp_avg=first(s)["exp_avg"].to_sparse()),
        "a number for a tensor": lambda s: first(s).update(exp_avg=0.0),
        "huge": lambda s: first(s).update(exp_avg=torch.zeros(1).expand(2**40)),
        "step that is no number": lambda s: first(s).update(step=torch.tensor(torch.nan)),
        "step before": lambda s: first(s).update(step=torch.tensor(1.0)),
        "step negative": lambda s: first(s).update(step=torch.tensor(-2.0)),
        "step of two": lambda s: first(s).update(step=torch.tensor([2.0, 2.0])),
        "step of integers": lambda s: first(s).update(step=torch.tensor(2)),
        "step a plain number": lambda s: first(s).update(step=2),
        "a key missing": lambda s: first(s).pop("exp_avg_sq"),
        "a key more": lambda s: first(s).update(max_exp_avg_sq=torch.zeros(1)),
        "a parameter missing": lambda s: s["optimizer"]["state"].pop(0),
        "a parameter more": lambda s: s["optimizer"]["state"].update({9999: first(s)}),
        "state is a list": lambda s: s["optimizer"].update(state=[]),
        "a group missing": lambda s: s["optimizer"]["param_groups"].pop(),
        "groups turned": lambda s: s["optimizer"]["param_groups"].reverse(),
        "another decay": lambda s: s["optimizer"]["param_groups"][0].update(weight_decay=0.5),
        "other betas": lambda s: s["optimizer"]["param_groups"][0].update(betas=(0.9, float("nan"))),
        "amsgrad": lambda s: s["optimizer"]["param_groups"][0].update(amsgrad=True),
        "a rate that is no number": lambda s: s["optimizer"]["param_groups"][0].update(lr=float("nan")),
        "a rate that is text": lambda s: s["optimizer"]["param_groups"][1].update(lr="0.1"),
        "no betas": lambda s: s["optimizer"]["param_groups"][0].pop("betas"),
        "another run's step": lambda s: s.update(step=1),
        "a negative step": lambda s: s.update(step=-1),
        "true for a step": lambda s: s.update(step=True),
        "evaluated later": lambda s: s.update(evaluated=3),
        "best is no number": lambda s: s.update(best=float("nan")),
        "another state": lambda s: [s.clear(), s.update(a=1)],
    }
    return edits if name is None else edits[name]


@pytest.mark.parametrize("name", edit(None))
def test_a_state_that_does_not_fit_is_refused(rooms, run, name):
    """torch's fused update writes past the end of a moment that is too short."""
    saved = torch.load(run / "last/training.pt", weights_only=True)
    edit(name)(saved)
    torch.save(saved, run / "last/training.pt")
    with pytest.raises(CheckpointError, match=r"training\.pt is damaged or not a training state .*\(--out\)"):
        create_loop(one_task(rooms), run)


@pytest.mark.parametrize("content", [{"a": 1}, [1], {"optimizer": {}}, {"optimizer": []}, 3])
def test_a_foreign_training_state_is_told(rooms, run, content):
    torch.save(content, run / "last/training.pt")
    with pytest.raises(CheckpointError, match=r"training\.pt is damaged or not a training state .*\(--out\)"):
        create_loop(one_task(rooms), run)


@pytest.mark.parametrize("damage", ["cut", "text", "compressed"])
def test_a_file_that_is_no_training_state_is_told(rooms, run, damage):
    path = run / "last/training.pt"
    if damage == "compressed":  # a few kilobytes that fill the memory
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in records.items():
                archive.writestr(name, content)
    else:
        path.write_bytes(path.read_bytes()[:1000] if damage == "cut" else b"text")
    with pytest.raises(CheckpointError, match=r"training\.pt is damaged"):
        create_loop(one_task(rooms), run)


def test_a_state_whose_axes_lie_otherwise_in_memory_goes_on(rooms, run, finished):
    """Not all that differs is damage: the numbers are the same."""
    saved = torch.load(run / "last/training.pt", weights_only=True)
    for state in saved["optimizer"]["state"].values():
        if state["exp_avg"].dim() == 2:
            state["exp_avg"] = state["exp_avg"].T.contiguous().T
    torch.save(saved, run / "last/training.pt")
    loop, _ = create_loop(one_task(rooms), run)
    loop.close()
    assert loop.state["step"] == 2


def lines_of(folder: Path) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["kind"]) for line in lines]


def board_of(folder: Path, tag: str) -> list[int]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [event.step for event in board.Scalars(tag)]


def test_a_damaged_log_does_not_stop_a_run(rooms, run):
    with (run / "log.jsonl").open("ab") as log:
        log.write(b'3\n{"step": "a"}\n\xff\xfe\n{"step": true, "kind": "val"}\n{"step": 1e999, "kind": "val"}\n')
        log.write(b"[" * 100_000 + b"\n" + b'{"a":' * 100_000 + b"\n" + b'{"step": 1' + b"0" * 9_000_000 + b"}\n")
        log.write(b'{"step": 2, "kind": "val", "x": "' + b"y" * 9_000_000 + b'"}\n' + b'{"step": 2, "ki')
    train(one_task(rooms), run, progress=False)
    assert lines_of(run) == [(1, "train"), (2, "train"), (2, "val")]
    assert (run / "log.jsonl").stat().st_size < 10_000


class Killed(BaseException):
    """Stands for a SIGKILL: nothing after it runs."""


@pytest.mark.parametrize("moment", ["after the log", "after best"])
def test_a_kill_between_evaluation_and_save_doubles_no_line(rooms, tmp_path, monkeypatch, moment):
    """Line and best/ of the evaluation are written, last/ does not know of it."""
    settings = one_task(rooms, steps=4, eval_every=2)
    train(settings, tmp_path / "whole", progress=False)
    save, validate = Loop.save, Loop.validate

    def killed(loop, *arguments):
        if loop.state["evaluated"] == 2:
            (tmp_path / "run/.last.new").mkdir()
            (tmp_path / "run/.best.new").mkdir()
            raise Killed
        return save(loop)

    monkeypatch.setattr(Loop, "save", killed)
    if moment == "after the log":  # the state of before, as a resumed run finds it, is the same

        def half(loop):
            validate(loop)
            raise Killed

        monkeypatch.setattr(Loop, "validate", half)
    with pytest.raises(Killed):
        train(settings, tmp_path / "run", progress=False)
    assert lines_of(tmp_path / "run")[-1] == (2, "val")
    monkeypatch.undo()
    train(settings, tmp_path / "run", progress=False)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")
    for tag in ("train/loss/depth", "val/loss"):
        assert board_of(tmp_path / "run", tag) == board_of(tmp_path / "whole", tag)
    assert not list((tmp_path / "run").glob(".*"))
    one, two = (load_file(tmp_path / name / "best/model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("which", ["last", "best", "run", "last that is not there yet"])
def test_a_symbolic_link_stays_and_its_place_is_written(rooms, tmp_path, which):
    """Large folders are often put on another disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    out = tmp_path / "out"
    if which == "run":
        out.symlink_to(disk)
        link = out
    else:
        out.mkdir()
        link = out / which.split()[0]
        if "not there" not in which:
            (disk / "place").mkdir()
        link.symlink_to(disk / "place")
    settings = one_task(rooms, steps=3, eval_every=1)
    train(settings, out, progress=False)
    train(settings, out, progress=False)
    assert link.is_symlink() and load_model(out).image_size == (48, 64)
    place = disk / "last" if which == "run" else disk / "place"
    assert (place / "model.safetensors").is_file()
    assert not [path for path in (*disk.glob(".*"), *out.glob(".*"))]
    os.rename(place, place.with_name(f".{place.name}.old"))  # killed between the two renames
    assert load_model(out).image_size == (48, 64)
    train(settings, out, progress=False)
    assert link.is_symlink() and (place / "model.safetensors").is_file()


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_weights_without_their_last_checkpoint_are_not_replaced(rooms, run, left):
    """A start from nothing would replace best/, log and results of a finished run."""
    shutil.rmtree(run / "last")
    if left == "an empty folder":
        (run / "last").mkdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"last, from which the run would go on, is gone.*--out.*remove best/"):
        train(one_task(rooms), run, progress=False)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    shutil.rmtree(run / "best")
    train(one_task(rooms), run, progress=False)
    assert load_model(run).image_size == (48, 64)


def test_a_lock_is_one_processs_own(tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(FolderInUseError, match=rf"this process \(pid {os.getpid()}\) trains into"):
        FolderLock(tmp_path)
    lock.release()
    lock.release()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".lock").write_text("a lock file that a killed process left\n")
    FolderLock(tmp_path).release()


def test_a_row_whose_folder_is_in_use_is_a_failed_row(rooms, tmp_path):
    table = TABLES["pamm-2"]
    own = Run("a row", "tiny", 0, one_task(rooms), tmp_path / "run")
    plan = Plan(table, (), (0,), (own,), {})
    (tmp_path / "run").mkdir()
    with FolderLock(tmp_path / "run"):
        failed = train_all(plan, progress=False, say=lambda line: None)
    assert "trains into" in failed["a row"]


def test_a_refused_start_gives_the_folder_up(rooms, tmp_path):
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"train\.freeze"):
            create_loop(one_task(rooms, freeze="all"), tmp_path / "run")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder data set with three classes."""
    generator = np.random.default_rng(0)
    root = tmp_path / "data"
    for split, count in (("train", 2), ("val", 1)):
        for kind in ("images", "semseg", "depth"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            image = generator.integers(0, 256, (48, 64, 3), np.uint8)
            Image.fromarray(image).save(root / split / f"images/{index}.png")
            labels = generator.integers(0, 3, (48, 64), np.uint8)
            Image.fromarray(labels).save(root / split / f"semseg/{index}.png")
            depth = generator.integers(500, 5000, (48, 64)).astype(np.uint16)
            Image.fromarray(depth).save(root / split / f"depth/{index}.png")
    describe(root)
    return root


def describe(root: Path, classes: str = "[sky, tree, road]", unit: str = "millimetre") -> None:
    text = f"tasks:\n  semseg: {{classes: {classes}}}\n  depth: {{unit: {unit}}}\n"
    (root / "dataset.yaml").write_text(text)


def on_folder(root: Path, **train):
    settings = experiment(**({"steps": 1, "batch": 1, "save_every": 1} | train))
    data = DataConfig(name="folder", root=str(root), size=(48, 64))
    return dataclasses.replace(settings, data=data, tasks={"semseg": TaskConfig(), "depth": TaskConfig()})


def test_what_the_data_set_says_of_a_task_is_part_of_the_run(folder, tmp_path):
    train(on_folder(folder), tmp_path / "run", progress=False)
    changes = {
        "tasks.semseg.classes: sky, tree, road there, tree, sky, road here": {"classes": "[tree, sky, road]"},
        "tasks.semseg.classes: sky, tree, road there, sky, tree, street here": {"classes": "[sky, tree, street]"},
        "tasks.semseg.classes: sky, tree, road there, sky, tree, road, car here": {"classes": "[sky, tree, road, car]"},
        "tasks.depth.unit: millimetre there, metre here": {"unit": "metre"},
    }
    for told, change in changes.items():
        describe(folder, **change)
        with pytest.raises(ConfigError, match="holds another experiment") as refusal:
            train(on_folder(folder), tmp_path / "run", progress=False)
        assert told in str(refusal.value) and "--init" in str(refusal.value)
    describe(folder)
    train(on_folder(folder), tmp_path / "run", progress=False)


def test_an_option_of_a_task_is_part_of_the_run(rooms, tmp_path):
    settings = dataclasses.replace(one_task(rooms), tasks={"edge": TaskConfig(1.0, {"positive_weight": 0.8})})
    train(settings, tmp_path, progress=False)
    other = dataclasses.replace(settings, tasks={"edge": TaskConfig(1.0, {"positive_weight": 0.9})})
    with pytest.raises(ConfigError, match=r"positive_weight: 0\.8 there, 0\.9 here"):
        train(other, tmp_path, progress=False)


def test_another_number_of_images_is_told(folder, tmp_path, capsys):
    loop, loader = create_loop(on_folder(folder, steps=3), tmp_path / "run")
    loop._one_step(next(iter(loader)))
    loop.close()
    for kind in ("images", "semseg", "depth"):
        shutil.copy(folder / "train" / kind / "0.png", folder / "train" / kind / "9.png")
    capsys.readouterr()
    train(on_folder(folder, steps=3), tmp_path / "run", progress=False)
    assert "had 2 images when" in (told := capsys.readouterr().err) and "has 3 now" in told


def test_what_is_doubtful_in_the_data_is_told_before_the_first_step(folder, tmp_path, capsys):
    describe(folder, classes="[sky, tree, road, car]")
    create_loop(on_folder(folder), tmp_path / "run")[0].close()
    assert "car" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_absent_split_is_told_before_the_first_step(folder, tmp_path, split):
    shutil.rmtree(folder / split)
    with pytest.raises(DataError, match=split):
        create_loop(on_folder(folder), tmp_path / "run")


def test_without_validation_labels_best_is_the_latest(folder, tmp_path, capsys):
    """No evaluation is better than another: the first of many would stay for good."""
    for path in (*(folder / "val/semseg").iterdir(), *(folder / "val/depth").iterdir()):
        path.unlink()
    result = train(on_folder(folder, steps=4, eval_every=1), tmp_path / "run", progress=False)
    assert result.model["step"] == 4
    last, best = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("last", "best"))
    assert all(torch.equal(last[key], best[key]) for key in last)
    told = capsys.readouterr().err
    assert "no label of semseg, depth" in told and "the latest weights, not the best" in told


def test_a_task_without_validation_labels_is_told(folder, tmp_path, capsys):
    for path in (folder / "val/depth").iterdir():
        path.unlink()
    create_loop(on_folder(folder), tmp_path / "run")[0].close()
    assert "no label of depth: not measured, and best/ is chosen by semseg" in capsys.readouterr().err


def test_tasks_of_weight_zero_do_not_choose_the_best(folder, tmp_path):
    """The only one that is measured weighs nothing: the total would be 0 at every evaluation."""
    for path in (folder / "val/depth").iterdir():
        path.unlink()
    settings = on_folder(folder, steps=3, eval_every=1)
    settings = dataclasses.replace(settings, tasks={"semseg": TaskConfig(0.0), "depth": TaskConfig()})
    assert train(settings, tmp_path / "run", progress=False).model["step"] == 3


def test_a_checkpoint_is_saved_by_the_clock(rooms, tmp_path):
    """After every step here, since each takes longer than a thousandth of a second."""
    settings = one_task(rooms, steps=9, save_every=100, save_minutes=1e-3 / 60)
    loop, loader = create_loop(settings, tmp_path)
    for parts in loader:
        loop._one_step(parts)
        assert torch.load(tmp_path / "last/training.pt", weights_only=True)["step"] == loop.state["step"]
        if loop.state["step"] == 3:
            break
    loop.close()
