"""Training as real processes: started, signalled, killed, waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pamm.config.experiment import Experiment, dump

TESTS = Path(__file__).parent
PATHS = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pamm", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, env=ENVIRONMENT)


def heed_interrupts() -> None:
    """A test suite in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments: object) -> subprocess.Popen:
    """The command in a session of its own."""
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


def written(settings: Experiment, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    dump(settings, folder / "given.yaml")
    return folder / "given.yaml"


def wait_until(true: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 180) -> None:
    """Wait until a condition holds; fail where the process ends before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return
        assert process is None or process.poll() is None, f"ended before: {process.communicate()}"
        time.sleep(0.02)
    raise AssertionError("not within three minutes")


def logged(log: Path, step: int) -> bool:
    """Whether the log has a line of `step`."""
    return log.exists() and any(f'"step": {step},' in line for line in log.read_text().splitlines())


def children(pid: int) -> list[int]:
    """Process ids of the children (Linux)."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


def ended(pid: int) -> bool:
    """Whether a process runs no more (a child that nobody waited for may be left as a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True
