"""One process per run folder: a lock of the operating system, which releases it when the process ends."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType

from pamm import PammError
from pamm.files import shown

LOCK_FILE = ".lock"

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Error numbers of file systems without locks."""

MOST = 4096
"""Bytes read of a lock file."""

FAR = 1 << 30
"""Windows locks a byte, which nobody else can read: this one lies behind the text."""

_held: set[str] = set()
"""Run folders locked by this process: POSIX locks do not keep a process from its own files."""


class FolderInUseError(PammError, RuntimeError):
    """Another process trains into the run folder; the message names it."""


class FolderLock:
    """Held from its creation until `release`, or until the process ends.

    A POSIX lock, which belongs only to this process: forked data loading processes do not keep it when this one is killed. On
    a file system without locks, the process id written in the file stands in, for processes of this machine. Raises
    FolderInUseError, and OSError where the file cannot be written.
    """

    def __init__(self, folder: Path):
        self.path = Path(os.path.realpath(folder)) / LOCK_FILE
        if str(self.path) in _held:
            raise FolderInUseError(
                f"this process (pid {os.getpid()}) trains into {folder} already. Wait until that run ends or close it "
                "(Loop.close), or choose another folder with --out"
            )
        self.file = self._open(folder)
        _held.add(str(self.path))
        os.ftruncate(self.file, 0)
        os.lseek(self.file, 0, os.SEEK_SET)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(self.file, f"{os.getpid()} {socket.gethostname()} {started}\n".encode())

    def _open(self, folder: Path) -> int:
        """The locked file's descriptor. An earlier holder removes its file while it holds the lock: then once more."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._take(file, folder)
                if os.path.samestat(os.fstat(file), os.stat(self.path)):
                    return file
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    @staticmethod
    def _take(file: int, folder: Path) -> None:
        try:
            _system_lock(file)
        except OSError as error:
            unsupported = error.errno in UNSUPPORTED
            owner = _owner(file)
            if unsupported and not _runs_here(owner):
                return
            if not unsupported and error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise
            pid, host, started = (owner + ["?"] * 3)[:3] if owner else ("?", "?", "?")
            since = f", since {shown(started)}" if started != "?" else ""
            raise FolderInUseError(
                f"another process (pid {shown(pid)} on {shown(host)}{since}) trains into {shown(folder, 200)}. Wait until it "
                "ends, or choose another folder with --out"
            ) from None

    def release(self) -> None:
        """Release the folder. A second call does nothing."""
        if self.file < 0:
            return
        file, self.file = self.file, -1
        _held.discard(str(self.path))
        if sys.platform != "win32":  # where an open file cannot be removed
            self.path.unlink(missing_ok=True)
        os.close(file)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def _system_lock(file: int) -> None:
    """Lock or raise OSError at once."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, FAR, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        return
    import fcntl

    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _owner(file: int) -> list[str]:
    """Process id, host and start that the file names; [] for a file that names none."""
    os.lseek(file, 0, os.SEEK_SET)
    return os.read(file, MOST).decode("utf-8", "replace").strip().split(" ", 2)[:3]


def _runs_here(owner: list[str]) -> bool:
    """Whether the process that a lock file names is another one, alive on this machine."""
    if len(owner) < 2 or owner[1] != socket.gethostname() or not owner[0].isdecimal() or sys.platform == "win32":
        return False
    pid = int(owner[0])
    if pid == os.getpid() or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True
