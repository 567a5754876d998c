"""A batch's files: whole or not at all, not made twice, and what is said where they cannot be written."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

import pamm
from command import run_command
from data.packages import as_user
from pamm.prediction import PredictError, Predictor, file_names, predict_files
from prediction.networks import create, photo


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    create("pamm").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def predictor(saved) -> Predictor:
    return Predictor(saved, device="cpu")


def pictures(folder: Path, names: list[str], size: tuple[int, int] = (20, 24)) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        Image.fromarray(photo(*size, seed)).save(folder / name)
    return [folder / name for name in names]


def pamm_process(*arguments: object, **options: object) -> subprocess.Popen:
    source = str(Path(pamm.__file__).parents[1])
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path[:0] = [{source!r}]; from pamm.cli import main; sys.exit(main())",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(os.fspath, map(str, arguments))], stdout=-1, stderr=-1, text=True, env=environment, **options
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files_have_the_umasks_mode_and_nothing_else_is_left(predictor, tmp_path):
    paths = pictures(tmp_path / "in", ["a.png"])
    previous = os.umask(0o027)
    try:
        predict_files(predictor, paths, tmp_path / "out", formats=["png", "npy", "picture"])
    finally:
        os.umask(previous)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 19 and {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {"0o640"}
    assert {path.suffix for path in files} == {".png", ".npy", ".jpg"}


def test_what_is_done_is_skipped_and_what_is_damaged_made_anew(predictor, tmp_path):
    paths, out = pictures(tmp_path / "in", ["a.png", "b.png", "c.png", "d.png"]), tmp_path / "out"
    formats = ["picture", "png", "npy"]
    predict_files(predictor, paths, out, formats=formats)
    expected = files_of(out)
    (out / "pictures" / "depth" / "b.png").write_bytes(expected["pictures/depth/b.png"][:-30])
    (out / "arrays" / "depth" / "c.npy").write_bytes(expected["arrays/depth/c.npy"][:-30])
    (out / "semseg" / "d.png").unlink()
    summary = predict_files(predictor, paths, out, formats=formats, skip_existing=True)
    assert summary.skipped == paths[:1] and summary.done == paths[1:]
    assert files_of(out) == expected
    again = predict_files(predictor, paths, out, formats=["png"], skip_existing=True)
    assert again.skipped == paths and not again.done
    assert predict_files(predictor, paths, out, formats=formats).done == paths


@pytest.mark.parametrize("kind", ["forbidden", "file", "file above", "device"])
def test_the_output_folder_is_tried_before_the_model_is_loaded(tmp_path, capsys, kind):
    pictures(tmp_path / "in", ["a.png"])
    (tmp_path / "file").touch()
    (tmp_path / "shut").mkdir()
    out = {"file": tmp_path / "file", "file above": tmp_path / "file" / "out", "device": Path("/proc/none")}.get(
        kind, tmp_path / "shut" / "out"
    )
    with as_user(tmp_path):
        (tmp_path / "shut").chmod(0o500)
        text = run_command(capsys, "predict", tmp_path / "no-model", tmp_path / "in", "--out", out, code=1)
    assert (str(out) in text and "choose another" in text) or "give a folder" in text
    assert "no-model" not in text


def test_formats_are_checked_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "in", ["a.png"])
    for given in ("tiff", "png,tiff", "", ","):
        text = run_command(capsys, "predict", tmp_path / "no-model", tmp_path / "in", "--formats", given, code=1)
        assert "png, npy, picture" in text and "no-model" not in text
    deep = ("--out", tmp_path / "deep" / "out")
    assert "nothing at" in run_command(capsys, "predict", tmp_path / "no-model", tmp_path / "in", *deep, code=1)
    assert os.listdir(tmp_path) == ["in"], "no folder is left where nothing was predicted"


def test_a_disk_that_fills_up_ends_the_batch_with_one_message(saved, predictor, tmp_path):
    paths = pictures(tmp_path / "in", [f"{i}.png" for i in range(5)])
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        summary = predict_files(predictor, paths, small, sheet=False)
        assert summary.stopped and "No space left on device" in summary.stopped
        assert len(summary.done) < 5 and not summary.failed
        for file in [path for path in small.rglob("*") if path.is_file()]:
            with Image.open(file) as picture:
                picture.load()
        fill(small / "depth" / "rest")
        with pytest.raises(PredictError, match=r"output folder .* cannot be written .No space left"):
            predict_files(predictor, paths, small)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def fill(path: Path) -> None:
    """Take all the space that is left."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_ctrl_c_says_how_to_go_on_and_leaves_whole_files(saved, tmp_path):
    pictures(tmp_path / "in", [f"{i:03}.png" for i in range(120)], (64, 64))
    out = tmp_path / "out"
    arguments = ("predict", saved, tmp_path / "in", "--out", out, "--device", "cpu", "--formats", "png")
    process = pamm_process(*arguments)
    deadline = time.monotonic() + 240
    while len(list((out / "depth").glob("*.png"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 130, said
    assert (
        "of 120 images are done, their files are whole; go on with --skip-existing" in said and "Traceback" not in said
    )
    for path in out.rglob("*"):
        assert path.is_dir() or (path.suffix in (".png", ".npy") and path.name[0] != ".")
    finished = int(said.split("interrupted: ")[1].split()[0])
    assert 0 < finished < 120
    shutil.rmtree(out)


def test_names_of_any_length_and_bytes_are_written(predictor, tmp_path):
    long = ["n" * 251 + ".png", "n" * 250 + "m.png", "ä" * 125 + ".png", "a" * 250 + ".jpeg"[:5]]
    names = [name for name in long if len(os.fsencode(name)) <= 255]
    odd = os.fsdecode(b"caf\xe9\x1b[2J.png")
    paths = pictures(tmp_path / "in", [*names, odd, "tab\tnew\nline.png"])
    summary = predict_files(predictor, paths, tmp_path / "out", formats=["png"])
    assert summary.done == paths and not summary.failed and summary.sheet
    assert len(list((tmp_path / "out" / "depth").iterdir())) == len(paths)
    assert len(set(file_names(paths))) == len(paths)
    assert predict_files(predictor, paths, tmp_path / "out", formats=["png"], skip_existing=True).skipped == paths
