"""Runs that are killed, signalled, started twice, or left without memory or room: real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command import run_command
from pamm.training.run import train
from runs import ENVIRONMENT, children, ended, logged, run, start, wait_until, written
from tiny import experiment

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds worker processes in /proc")


@pytest.fixture(scope="session")
def rooms(tmp_path_factory) -> str:
    """Cache of the synthetic data that the tests of this session share."""
    return str(tmp_path_factory.mktemp("synthetic"))


def begun(rooms, tmp_path, step=3, **train):
    """A run of 500 steps that has logged `step`, and its folder."""
    settings = {"steps": 500, "save_every": 1000, "save_minutes": 0.0, "workers": 1} | train
    given = written(experiment(rooms, **settings), tmp_path)
    process = start("train", given, "--out", tmp_path / "run", "--quiet")
    wait_until(lambda: logged(tmp_path / "run/log.jsonl", step), process)
    return process, tmp_path / "run", given


def saved_step(folder: Path) -> int:
    return torch.load(folder / "last/training.pt", weights_only=True)["step"]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(rooms, tmp_path):
    given = written(experiment(rooms, steps=15, save_every=4, eval_every=5, workers=1), tmp_path)
    whole = run("train", given, "--out", tmp_path / "whole", "--quiet")
    assert whole.returncode == 0, whole.stderr
    killed = start("train", given, "--out", tmp_path / "killed", "--quiet")
    wait_until(lambda: logged(tmp_path / "killed/log.jsonl", 9), killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert 4 <= saved_step(tmp_path / "killed") < 15
    resumed = run("train", given, "--out", tmp_path / "killed", "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    for part in ("last", "best"):
        one, two = (load_file(tmp_path / name / part / "model.safetensors") for name in ("whole", "killed"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "whole/results.json").read_text().replace("whole", "killed") == (
        tmp_path / "killed/results.json"
    ).read_text()
    steps = [json.loads(line) for line in (tmp_path / "killed/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps if entry["kind"] == "train"] == list(range(1, 16))
    assert [entry["step"] for entry in steps if entry["kind"] == "val"] == [5, 10, 15]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "whole_group"),
    [
        pytest.param(signal.SIGTERM, 143, False, id="SIGTERM to the process"),
        pytest.param(signal.SIGINT, 130, True, id="Ctrl-C to the group"),
        pytest.param(signal.SIGTERM, 143, True, id="SIGTERM to the group", marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGINT, 130, False, id="Ctrl-C to the process", marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_saves_and_exits(rooms, tmp_path, number, code, whole_group):
    """Schedulers and terminals signal the whole group, the data loading workers included."""
    process, folder, _ = begun(rooms, tmp_path)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    step = saved_step(folder)
    assert 3 <= step < 500
    assert f"stopped after step {step} of 500" in errors and "same command again to go on" in errors


@pytest.mark.slow
@linux
def test_one_process_per_run_folder(rooms, tmp_path, capsys):
    """The second is refused with the first's process; the first goes on. Killed, it leaves no lock and no worker."""
    process, folder, given = begun(rooms, tmp_path, save_every=1)
    for second in (("train", given), ("demo",)):
        told = run_command(capsys, *second, "--out", folder, "--quiet", code=1)
        assert f"another process (pid {process.pid} on " in told and "--out" in told and told.count("\n") == 1
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) >= 3
    workers = children(process.pid)
    assert workers
    process.kill()
    process.communicate()
    wait_until(lambda: all(ended(worker) for worker in workers))
    assert (folder / ".lock").exists()  # the file stays, the lock does not
    begun_anew = start("train", given, "--out", folder, "--quiet")
    wait_until(lambda: logged(folder / "log.jsonl", len(lines) + 2), begun_anew)
    begun_anew.send_signal(signal.SIGTERM)
    _, errors = begun_anew.communicate(timeout=120)
    assert begun_anew.returncode == 143, errors
    assert not (folder / ".lock").exists()


@pytest.mark.slow
@linux
@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.exhaustive), signal.SIGBUS])
def test_a_killed_data_worker_is_told_in_a_line(rooms, tmp_path, number):
    process, folder, _ = begun(rooms, tmp_path, save_every=2)
    worker = next(child for child in children(process.pid))
    os.kill(worker, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    told = errors.strip().splitlines()[-1].lstrip("\0")  # torch's own line about a SIGBUS ends in one
    assert told.startswith("pamm: a data loading process ended") and "Traceback" not in errors
    assert "--train.workers 0" in told and "--shm-size" in told and f"{folder / 'last'} holds step " in told


KILL_POOL = """
import os, signal, sys
import numpy as np, torch
from pamm.tasks import create_task
from pamm.tasks.metrics import images
from pamm.cli import main
images.processes = lambda: 2

def evaluate(arguments):
    metric = create_task("edge").metric()
    generator = torch.Generator().manual_seed(0)
    metric.update(torch.rand(8, 1, 200, 200, generator=generator), (torch.rand(8, 1, 200, 200) > 0.9).byte())
    os.kill(next(iter(metric.pool._processes)), signal.SIGKILL)  # the other has to be ended
    metric.compute()

from pamm.command_line import COMMANDS
COMMANDS["eval"] = ("", "__main__:evaluate")
sys.exit(main(["eval"]))
"""


@pytest.mark.slow
@linux
def test_a_killed_pool_worker_is_told_in_a_line():
    done = subprocess.run(
        [sys.executable, "-c", KILL_POOL], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("pamm: a worker process ended before its image was done"), done.stderr
    assert done.stderr.count("\n") == 1


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from pamm.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pamm.training import loop
save, count = loop.save_checkpoint, 0
def full(target, *arguments):
    global count
    count += 1
    if count == 2:  # from now on no file takes more than a few kilobytes: a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return save(target, *arguments)
loop.save_checkpoint = full
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@linux
def test_a_full_disk_keeps_the_last_checkpoint(rooms, tmp_path):
    given = written(experiment(rooms, steps=8, save_every=2), tmp_path)
    arguments = ["train", str(given), "--out", str(tmp_path / "run"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 1, done.stderr
    told = done.stderr.strip().splitlines()[-1]
    assert told.startswith("pamm: could not save") and "is intact" in told and "Traceback" not in done.stderr
    assert saved_step(tmp_path / "run") == 2
    assert not list((tmp_path / "run").glob(".last.*"))


FULL_FROM_THE_START = """
import resource, signal, sys
from pamm.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@linux
def test_a_disk_too_full_for_the_log_is_told(rooms, tmp_path):
    train(experiment(rooms, steps=3), tmp_path / "rooms are made", progress=False)
    given = written(experiment(rooms, steps=100, save_every=1000), tmp_path)
    arguments = ["train", str(given), "--out", str(tmp_path / "run"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", FULL_FROM_THE_START, *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert str(tmp_path / "run") in done.stderr and "free space" in done.stderr, done.stderr


PREPARE_AND_WAIT = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from pamm.runtime.workers import serve_parent
if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, multiprocessing.get_context(sys.argv[1]), serve_parent)
    print(*pool.map(abs, range(1)), *pool._processes, flush=True)
    time.sleep(600)
"""


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_pool_workers_end_with_their_parent(tmp_path, method, number):
    """However it ends; a Ctrl-C is the parent's to answer."""
    (tmp_path / "parent.py").write_text(PREPARE_AND_WAIT)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", method],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    workers = [int(word) for word in parent.stdout.readline().split()[1:]]
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGINT)
    assert not any(map(ended, workers))
    parent.send_signal(number)
    parent.wait()
    wait_until(lambda: all(map(ended, workers)))
    parent.stdout.close()


KILLED_READER = """
import os, signal, sys
from pamm.cli import main
from pamm.data.synthetic import SyntheticDataset
SyntheticDataset.__getitem__ = lambda self, index: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@linux
def test_a_killed_data_worker_of_an_evaluation_is_told_in_a_line(rooms, tmp_path):
    train(experiment(rooms, steps=1), tmp_path / "run", progress=False)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_READER, "eval", str(tmp_path / "run"), "--workers", "1"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("pamm: a data loading process ended") and "--workers 0" in done.stderr


@pytest.mark.slow
@linux
def test_a_killed_maker_of_rooms_is_told_in_a_line(tmp_path):
    settings = experiment(str(tmp_path / "rooms"))
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, images=(3000, 5)))
    process = start("data", written(settings, tmp_path))
    wait_until(lambda: list((tmp_path / "rooms").rglob("*.z")), process)
    makers = [c for c in children(process.pid) if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]
    os.kill(makers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    told = errors.strip().splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert told.startswith("pamm: a process that made synthetic rooms ended")


@pytest.mark.slow
@linux
def test_a_read_only_run_folder_is_told(rooms, tmp_path):
    """Mounted read-only, since permissions do not bind the superuser."""
    folder = tmp_path / "run"
    folder.mkdir()
    given = written(experiment(rooms, steps=2), tmp_path)
    line = f"mount --bind '{folder}' '{folder}' && mount -o remount,ro,bind '{folder}' && exec \"$@\""
    alone = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    try:
        usable = subprocess.run([*alone, line, "sh", "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        usable = False
    if not usable:
        pytest.skip("mounts need rights of their own here (unshare --mount)")
    arguments = ["train", str(given), "--out", str(folder), "--quiet"]
    done = subprocess.run(
        [*alone, line, "sh", sys.executable, "-m", "pamm", *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "Read-only file system" in done.stderr and str(folder) in done.stderr
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_memory_that_does_not_suffice_is_told(rooms, tmp_path):
    """A step that asks for more memory than there is, after a checkpoint."""
    code = (
        "import sys, torch\nfrom pamm.training import loop\nfrom pamm.cli import main\n"
        "whole, count = loop.Loop.update, 0\n"
        "def update(self, parts):\n"
        "    if self.state['step'] == 3: torch.empty(2**50)\n"
        "    return whole(self, parts)\n"
        "loop.Loop.update = update\nsys.exit(main(sys.argv[1:]))"
    )
    given = written(experiment(rooms, steps=8, save_every=2), tmp_path)
    arguments = ["train", str(given), "--out", str(tmp_path / "run"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    told = done.stderr.strip().splitlines()[-1]
    assert told.startswith("pamm: the memory does not suffice") and "--train.batch" in told and "holds step 2" in told
