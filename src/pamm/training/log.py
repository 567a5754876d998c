"""The log of a run: log.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pamm.files import replacing

LONGEST = 1 << 22
"""Bytes of the longest line that is read; ours have a few kilobytes, a long list of classes some hundred."""

Line = tuple[int, bytes, dict]
"""Step, the line as it stands, its content."""


class _Thread:
    """While it lives, an OSError in TensorBoard's writing thread is not printed there: the next write raises it."""

    def __init__(self):
        self.previous, threading.excepthook = threading.excepthook, self._receive

    def _receive(self, found: threading.ExceptHookArgs) -> None:
        if not issubclass(found.exc_type, OSError):
            self.previous(found)

    def close(self) -> None:
        threading.excepthook = self.previous


class Log:
    """Appends to log.jsonl and TensorBoard in a run folder.

    Where a run resumes, at `step`, lines of later steps are dropped, and those of evaluations after `evaluated`, which are done
    again: so no line stands twice, whenever the process was killed.
    """

    def __init__(self, out: Path, step: int, evaluated: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.folder = out / "log.jsonl", out / "tensorboard"
        gone, recent = step + 1, []
        with replacing(self.path) as new, new.open("wb") as kept:
            for number, line, content in _lines(self.path):
                if number <= (evaluated if content["kind"] == "val" else step) and step:
                    kept.write(line + b"\n")
                    if number > evaluated:
                        recent.append((number, content))
                else:
                    gone = min(gone, number)
        self.file = self.path.open("a", encoding="utf-8")
        self.thread = _Thread()
        self.board = SummaryWriter(str(self.folder), purge_step=gone)
        for number, content in recent:
            if number >= gone:  # TensorBoard drops whole steps: what stays of them is written once more
                self._draw(number, content["kind"], content)

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One line and the same numbers to TensorBoard; numbers that are not finite are left out."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        with _naming(self.path):
            self.file.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
            self.file.flush()
        self._draw(step, kind, finite)

    def _draw(self, step: int, kind: str, values: dict[str, float]) -> None:
        with _naming(self.folder):
            for key, value in values.items():
                if key not in ("step", "kind") and isinstance(value, (int, float)):
                    self.board.add_scalar(f"{kind}/{key}", value, step)

    def flush(self) -> None:
        """Let TensorBoard's file hold all that was written."""
        with _naming(self.folder):
            self.board.flush()

    def close(self) -> None:
        """Close both."""
        with _naming(self.path):
            self.file.close()
        try:
            with _naming(self.folder):
                self.board.close()
        finally:
            self.thread.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Context manager: the error of a full disk, which names no file, names the log."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _lines(path: Path) -> Iterator[Line]:
    """The whole lines of a log that are ours; others, cut off, foreign or far too long, are passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        while line := file.readline(LONGEST):
            if not line.endswith(b"\n"):  # too long, or the last one, cut off: neither is ours
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST)
                continue
            content = _content(line)
            if content is not None:
                yield content["step"], line.rstrip(b"\r\n"), content


def _content(line: bytes) -> dict | None:
    """The values of a line with a step and a kind, else None."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fits = isinstance(content, dict) and type(content.get("step")) is int and content.get("kind") in ("train", "val")
    return content if fits else None
