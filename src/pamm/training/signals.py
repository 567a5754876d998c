"""SIGTERM and SIGINT (Ctrl-C) during a run: it is saved after the current step, then ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class StopSignals:
    """While entered, stores the signal in `told`.

    Calls `stop` with the signal at once where `nothing_unsaved()`, and on a second Ctrl-C whatever is unsaved. Python delivers
    signals to the main thread only: elsewhere this does nothing.
    """

    def __init__(self, nothing_unsaved: Callable[[], bool], stop: Callable[[int], None], *, speaks: bool):
        self.told = 0
        self.nothing_unsaved, self.stop, self.speaks = nothing_unsaved, stop, speaks
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                if signal.getsignal(number) is not signal.SIG_IGN:  # a run started with nohup stays deaf to it
                    self.previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        again = number == signal.SIGINT and self.told == signal.SIGINT
        self.told = number
        if again or self.nothing_unsaved():
            self.stop(number)
        elif self.speaks:
            say("stopping: saved after this step" + ("; Ctrl-C again stops at once" if number == signal.SIGINT else ""))


def say(text: str) -> None:
    """A line on the standard error; also from within a signal handler, which may interrupt another writer."""
    sys.stderr.flush()
    os.write(2, f"\npamm: {text}\n".encode(errors="backslashreplace"))


def exit_with(number: int, text: str) -> None:
    """Raise KeyboardInterrupt with the text (exit code 130), or say the text and raise SystemExit(143)."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt(text)
    if text:
        say(text)
    raise SystemExit(EXIT_CODES[signal.SIGTERM])
