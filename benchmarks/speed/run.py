"""Cases in processes of their own: one that crashes or runs out of memory is reported, and the others go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pamm
from speed import BenchError
from speed.record import records

CHILD = ("-m", "speed.child")
"""Arguments of Python that start the process of a case."""

LONGEST = 60.0
"""Seconds of a first call beyond which it is not repeated, neither for its time (unless the budget is larger) nor its memory."""

TIME_LIMIT = 1800.0
"""Seconds after which a process is ended and its candidate reported."""


def measure(bench: str, case: str, what: str, job: dict[str, Any], *, memory: bool) -> list[dict[str, Any]]:
    """Time a case's candidates in one process, then, if asked, find the peak memory of each in one more process each.

    Calls of more than LONGEST seconds are not repeated for their memory. A candidate whose process ends early is recorded with
    the reason, and the others are measured without it. Raises BenchError for a job that cannot be begun.
    """
    names = job["settings"]["candidates"]
    lost: dict[str, str] = {}
    found: dict[str, Any] | None = None
    while found is None and len(lost) < len(names):
        found, name, reason = _child({**job, "mode": "time", "longest": LONGEST, "skip": list(lost)})
        if found is None:
            if name is None or name in lost:
                raise BenchError(f"{bench} {case}: the process ended before the first candidate: {reason}")
            lost[name] = reason
    nothing = {"seconds": None, "flops": None, "difference": None}
    found = found or {"shape": job["settings"], "images": None, "steps": None, "threads": None, "candidates": {}}
    timed = found["candidates"]
    found["candidates"] = {n: timed.get(n) or nothing | {"error": lost.get(n)} for n in names}
    found["memories"] = {names[0]: found["memory"]} if found.get("memory") else {}
    if memory:
        seconds = {name: (timing["seconds"] or {}).get("median") for name, timing in found["candidates"].items()}
        for name in (n for n in names if seconds[n] is not None and seconds[n] <= LONGEST):
            done, _, reason = _child({**job, "mode": "memory", "only": name})
            if done:
                found["memories"][name] = done["memory"]
            else:
                found["candidates"][name]["error"] = f"when its memory was measured: {reason}"
    return records(bench, case, what, job, found)


def _child(job: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None, str]:
    """Run a job → its result, or None with the candidate under way and the reason. Raises BenchError for what the job told."""
    source = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(pamm.__file__).parents[1])])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    try:
        with _ending_with_this_process():
            done = subprocess.run(
                [sys.executable, *CHILD],
                input=json.dumps(job),
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
                env={**os.environ, "PYTHONPATH": path},
                check=False,
            )
        output, reason = done.stdout, _ended(done)
    except subprocess.TimeoutExpired as error:
        output, reason = (error.stdout or b"").decode(), f"not done after {TIME_LIMIT:.0f} s"
    under_way = None
    for event in _events(output):
        if "failed" in event:
            raise BenchError(event["failed"])
        if "result" in event:
            return event["result"], None, ""
        under_way = event["begin"]
    return None, under_way, reason


@contextmanager
def _ending_with_this_process() -> Iterator[None]:
    """A SIGTERM ends the process of the case as well, which would disturb whatever is measured next."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _events(output: str) -> Iterator[dict[str, Any]]:
    for line in output.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # cut off in the middle
            return


def _ended(done: subprocess.CompletedProcess) -> str:
    if done.returncode < 0:
        return f"ended by signal {-done.returncode} (out of memory, or a crash)"
    lines = done.stderr.strip().splitlines() or ["no message"]
    return lines[-1][:300]
