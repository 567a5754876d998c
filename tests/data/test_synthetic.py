"""The synthetic data set: samples by the tasks' contract, and a cache that any process may use."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pamm.config.experiment import DataConfig
from pamm.data import DataError, dataset_options, open_dataset
from pamm.data.inspect import inspect_dataset
from pamm.data.scenes import CLASSES
from pamm.tasks import Task, create_task

SIZE = (47, 66)


def config(folder: Path, **changes: object) -> DataConfig:
    return dataclasses.replace(DataConfig(name="synthetic", root=str(folder), size=SIZE, images=(3, 2)), **changes)


def tasks(settings: DataConfig, *names: str) -> dict[str, Task]:
    options = dataset_options(settings)
    return {name: create_task(name, **options[name]) for name in names or options}


def test_samples_keep_to_the_tasks_contract(tmp_path):
    settings = config(tmp_path)
    dataset = open_dataset(settings, "train", tasks(settings))
    sample = dataset[1]
    assert len(dataset) == 3 and sample.id == dataset.ids[1] and sample.size == SIZE
    assert sample.image.shape == (3, *SIZE) and sample.image.dtype == torch.uint8
    for name, task in dataset.tasks.items():
        label = sample.labels[name]
        assert label.shape == (task.label_channels, *SIZE) and label.dtype == task.label_dtype
        assert task.valid(label).all()
    assert dataset.tasks["semseg"].channels == len(CLASSES) and dataset.tasks["human_parts"].channels == 7
    assert set(open_dataset(settings, "val", tasks(settings, "sal", "depth"))[0].labels) == {"sal", "depth"}


@pytest.mark.parametrize("size", [(1, 1), (33, 20), (16, 81)])
def test_any_size(tmp_path, size):
    settings = config(tmp_path, size=size)
    sample = open_dataset(settings, "train", tasks(settings))[0]
    assert sample.image.shape == (3, *size) and sample.labels["normals"].shape == (3, *size)


def digest(settings: DataConfig, split: str = "train", index: int = 0) -> str:
    sample = open_dataset(settings, split, tasks(settings))[index]
    maps = [sample.image, *(sample.labels[name] for name in sorted(sample.labels))]
    return hashlib.sha256(b"".join(m.numpy().tobytes() for m in maps)).hexdigest()


OTHER_PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_synthetic import config, digest
print(digest(config(Path(sys.argv[1]))))
"""


def start(root: Path, threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OTHER_PROCESS, str(root), str(Path(__file__).parent)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": str(threads)},
    )


def test_processes_agree_and_may_share_a_cache(tmp_path):
    """Two processes at once on one empty cache, and this one on another: the same bytes, no temporary file left."""
    others = [start(tmp_path / "shared", threads) for threads in (1, 2)]
    found = {other.communicate()[0].strip() for other in others}
    assert found == {digest(config(tmp_path / "own"))}
    assert [path.suffix for path in (tmp_path / "shared").rglob("*") if path.is_file()] == [".z"]


def test_samples_differ_by_seed_split_and_index(tmp_path):
    settings = config(tmp_path)
    other = config(tmp_path, seed=1)
    assert len({digest(settings), digest(settings, index=1), digest(settings, "val"), digest(other)}) == 4
    assert digest(settings) == digest(config(tmp_path, images=(1, 1)))


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other"])
def test_a_damaged_cache_file_is_made_anew(tmp_path, damage):
    settings = config(tmp_path, size=(20, 24))
    expected = digest(settings)
    (file,) = tmp_path.rglob("*.z")
    data = file.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
    file.write_bytes({"empty": b"", "cut": data[:middle], "flipped": flipped, "other": b"not a sample"}[damage])
    assert digest(settings) == expected
    assert file.read_bytes() == data


def test_cached_samples_are_read_not_made(tmp_path):
    settings = config(tmp_path)
    digest(settings)
    (file,) = tmp_path.rglob("*.z")
    before = file.stat().st_mtime_ns
    digest(settings)
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("workers", [0, 2])
def test_prepare_fills_the_cache(tmp_path, workers, capsys):
    settings = config(tmp_path, size=(16, 16), images=(4, 1))
    digest(settings, index=2)
    dataset = open_dataset(settings, "train", {})
    dataset.prepare(workers=workers)
    assert len(list(tmp_path.rglob("*.z"))) == 4
    assert "3/3" in capsys.readouterr().err
    dataset.prepare(progress=True)
    assert capsys.readouterr().err == ""


def test_inspection_counts_what_was_made_and_makes_nothing(tmp_path):
    settings = config(tmp_path, size=(16, 16), images=(3, 2))
    digest(settings, index=2)
    files = sorted(tmp_path.rglob("*.z"))
    for deep in (False, True):
        train, val = inspect_dataset(settings, deep=deep)
        assert (train.images, set(train.labels.values())) == (
            1,
            {1},
        ) and "2 of 3 images are not made yet" in train.notes[0]
        assert (val.images, set(val.labels.values())) == (0, {0}) and "2 of 2 images are not made yet" in val.notes[0]
        assert train.problems == val.problems == [] and sorted(tmp_path.rglob("*.z")) == files
    for split in ("train", "val"):
        open_dataset(settings, split, {}).prepare(progress=False)
    train, val = inspect_dataset(settings, deep=True)
    assert (train.images, val.images, train.notes, val.notes) == (3, 2, [], [])
    assert train.smallest == train.largest == (16, 16)


def test_default_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    digest(config(tmp_path, root=None, size=(8, 8)))
    assert len(list((tmp_path / "pamm" / "synthetic").rglob("*.z"))) == 1


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({"images": (0, 0)}, "train", "data.images"),
        ({"images": (3, 0)}, "val", "data.images"),
        ({"seed": -1}, "train", "data.seed"),
        ({}, "test", "train, val"),
    ],
)
def test_settings_that_make_no_images(tmp_path, changes, split, message):
    with pytest.raises(DataError, match=message):
        open_dataset(config(tmp_path, **changes), split, {})


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    settings = config(tmp_path / "file")
    with pytest.raises(DataError, match=r"data\.root"):
        open_dataset(settings, "train", {})[0]


WITHOUT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
sys.modules["embreex"] = None
from pamm.data import DataError, open_dataset
from pamm.config.experiment import DataConfig
settings = DataConfig(name="synthetic", root=sys.argv[1], size=(8, 8), images=(1, 1))
print(open_dataset(settings, "train", {})[0].size)
try:
    open_dataset(settings, "val", {})
except DataError as error:
    print(error)
"""


def test_without_the_renderer_cached_samples_work_and_others_name_the_remedy(tmp_path):
    open_dataset(config(tmp_path, size=(8, 8), images=(1, 1)), "train", {}).prepare(progress=False)
    command = [sys.executable, "-c", WITHOUT, str(tmp_path), "."]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.startswith("(8, 8)") and 'pip install "pamm[demo,train]"' in output
