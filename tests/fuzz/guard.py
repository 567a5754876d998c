"""What a parser of foreign files must not do: take long, take all memory, write, run a program, reach the network."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS, BYTES = 10, 4 * 2**30

CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "os.truncate",
}
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "socket.connect"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_sandbox: list[Path] = []
_installed: list[bool] = []


class ForbiddenError(BaseException):
    """Of no kind that a parser catches."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _sandbox:
        return
    if event in STARTS:
        raise ForbiddenError(f"{event} {arguments}")
    if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
        for path in arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]:
            if isinstance(path, (str, bytes, os.PathLike)) and not _inside(os.fsdecode(path)):
                raise ForbiddenError(f"{event} {arguments}")


def _inside(path: str) -> bool:
    return path == os.devnull or Path(os.path.abspath(path)).is_relative_to(_sandbox[0])


def _late(*_: object) -> None:
    raise ForbiddenError(f"more than {SECONDS} seconds")


@contextmanager
def guarded(sandbox: Path) -> Iterator[None]:
    """Inside, whatever is forbidden raises ForbiddenError; a hang in foreign code ends the process with its traceback."""
    if not _installed:
        sys.addaudithook(_watch)
        _installed.append(True)
    before, handler, bytecode = time.monotonic(), signal.signal(signal.SIGALRM, _late), sys.dont_write_bytecode
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
    sys.dont_write_bytecode = True
    _sandbox.append(sandbox.absolute())
    try:
        yield
    finally:
        _sandbox.clear()
        sys.dont_write_bytecode = bytecode
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        faulthandler.cancel_dump_traceback_later()
    if time.monotonic() - before > SECONDS:
        raise ForbiddenError(f"more than {SECONDS} seconds")


def limit_memory() -> None:
    """From now on this process gets no more than BYTES beside what it has: a request beyond fails."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def memory_taken() -> int:
    """The most bytes of memory that this process has held so far."""
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
