"""C files compiled with the system's compiler, and kept in the user's cache where nobody else can put a library.

A library is loaded only from a folder that belongs to this process's user and that no other may write, and only while it is
the file whose digest stands beside it. Whatever is wrong with the compiler or the cache ends in a reason, not in an error.

The first compilation of a process is reported in one line on stderr by the logger of this module; `logging` can silence it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import selectors
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from pamm import PammError
from pamm.files import cache_folder, shown

FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
NATIVE = ("-march=native", "-mcpu=native")
"""Flags for this very processor; the first that the compiler takes is used."""

KEPT = 100
"""Libraries that the folder may hold: some ten machines' that share a home folder, about ten megabytes."""

DAY = 86400
"""Seconds after which the folder of a compilation that was cut off is removed."""

PATIENCE_VERSION, PATIENCE = 10.0, 120.0
"""Seconds after which a compiler that was asked for its version, or to compile, is taken to hang."""

MOST_PRINTED, LARGEST = 2**20, 2**26
"""Bytes that a compiler may print, and that a library may have."""

OTHERS = stat.S_IWGRP | stat.S_IWOTH

log = logging.getLogger(__name__)


class BuildError(PammError, RuntimeError):
    """Why a kernel could not be built."""


def load(source: Path) -> ctypes.CDLL:
    """The functions of a C file, from the cache or freshly compiled. Raises BuildError, OSError."""
    if os.name != "posix":
        raise BuildError(f"the C kernel needs POSIX threads, this is {platform.system()}")
    compiler, version = _compiler(os.environ.get("CC"))
    native, instructions = _target(tuple(compiler))
    parts = [*_texts(source), *map(os.fsencode, (*compiler, *FLAGS, *native)), version, instructions]
    name = f"{source.stem}-{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:20]}.so"
    with _place() as (folder, objection):
        if folder and _in_use(f"{folder}/{name}") and _sound(folder, name):
            return ctypes.CDLL(f"{folder}/{name}")
        _tell(
            f"every process compiles the C kernels anew: {objection}"
            if objection
            else "compiling the C kernels, some seconds"
        )
        with tempfile.TemporaryDirectory(prefix="pamm-", dir=folder) as new:
            made = Path(new) / name
            _compile([*compiler, *FLAGS, *native], source, made)
            library = ctypes.CDLL(str(made))
            if folder:
                with suppress(OSError):  # of a full disk: the library is loaded, and the next process compiles it again
                    _keep(made, Path(folder))
                    _prune(Path(folder))
        return library


def objection() -> str | None:
    """Why compiled kernels are not kept for the next process, or None."""
    if os.name != "posix":  # where there are none
        return None
    with _place() as (_, reason):
        return reason


@lru_cache(maxsize=8)
def _tell(message: str) -> None:
    """Log a message, once in a process."""
    log.warning(message)


# -- the folder ----------------------------------------------------------------------------------------------------------


@contextmanager
def _place() -> Iterator[tuple[str | None, str | None]]:
    """A folder that only this user can write, or None and the reason.

    Where the system allows it the folder is named by an open file, so that it cannot be exchanged after it was examined.
    """
    try:
        folder = cache_folder("kernels")
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        yield None, f"there is no folder to keep them in ({shown(error, 200)})"
        return
    try:
        reason = _refused(folder, handle)
        if reason:
            with suppress(OSError):  # one that root has just made in another user's folder
                folder.rmdir()
        opened = f"/proc/{os.getpid()}/fd/{handle}"
        yield None if reason else opened if os.path.isdir(opened) else str(folder), reason
    finally:
        os.close(handle)


def _refused(folder: Path, handle: int) -> str | None:
    """Why libraries in this folder, also open as `handle`, may be another user's, or None."""
    known = [(path, os.lstat(path)) for path in (folder.parent, folder)]
    known += [(folder.parent, os.stat(folder.parent)), (folder, os.fstat(handle))]
    for path, status in known:
        if status.st_uid != os.geteuid():
            other = f"{shown(path, 300)} belongs to another user (number {status.st_uid})"
            return f"{other}; set XDG_CACHE_HOME to a folder of your own"
        if not stat.S_ISLNK(status.st_mode) and status.st_mode & OTHERS:
            return (
                f"{shown(path, 300)} may be written by other users; remove the files in it that are not yours, then: "
                f"chmod go-w {shlex.quote(shown(path, 300))}"
            )
    return None


_held: list[int] = []
"""Open files of the libraries that this process uses, each with a shared lock."""


def _in_use(path: str) -> bool:
    """Note that this process uses a library: until it ends, no other removes it. False where there is none to use."""
    import fcntl

    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.utime(handle, ns=(time.time_ns(), os.fstat(handle).st_mtime_ns))
    except BlockingIOError:  # it is being removed
        os.close(handle)
        return False
    except OSError:  # a file system without locks, where nothing is removed
        pass
    _held.append(handle)
    return True


def _prune(folder: Path) -> None:
    """Remove libraries beyond the `KEPT` that were used last, if no process uses them, and what cut-off compilations left."""
    import fcntl

    for path in sorted(folder.glob("*.so"), key=lambda path: path.lstat().st_atime_ns, reverse=True)[KEPT:]:
        with suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            path.with_name(_digest_name(path.name)).unlink()
    for path in folder.glob("pamm-*"):
        if time.time() - path.lstat().st_mtime > DAY:
            shutil.rmtree(path, ignore_errors=True)


def _sound(folder: str, name: str) -> bool:
    """Whether the folder holds this library as it was compiled, by its digest, and as a file that only this user can write."""
    try:
        content, digest = (_read(f"{folder}/{file}") for file in (name, _digest_name(name)))
    except OSError:
        return False
    return content is not None and digest is not None and _digest(content) == digest


def _read(path: str) -> bytes | None:
    """A file's content; None unless it is a plain file that only this user can write. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & OTHERS
        return file.read() if own and status.st_size <= LARGEST else None


def _keep(made: Path, folder: Path) -> None:
    """Move a compiled library, which this process uses, into the cache, with its digest.

    Both are on the disk before they have their names.

    A process killed in between leaves a library whose digest is absent or another's, which the next one compiles again.
    """
    digest = made.with_name(_digest_name(made.name))
    digest.write_bytes(_digest(made.read_bytes()))
    for file in (made, digest):
        file.chmod(0o700 if file == made else 0o600)
        _sync(file)
    _in_use(str(made))
    for file in (made, digest):
        file.replace(folder / file.name)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest_name(name: str) -> str:
    return f"{name}.sha256"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


# -- the compiler --------------------------------------------------------------------------------------------------------

_hanging: set[tuple[str, ...]] = set()
"""Compilers that ran out of patience: another kernel does not wait for them again."""


def _compiler(command: str | None) -> tuple[list[str], bytes]:
    """The command named by the variable CC, by default cc, and what it says of its version. Raises BuildError."""
    try:
        compiler = shlex.split("cc" if command is None else command)
    except ValueError as error:
        raise BuildError(f"the variable CC, {shown(command)}, is no command ({error}); correct or unset it") from None
    told = shown(" ".join(compiler))
    if not compiler or shutil.which(compiler[0]) is None:
        raise BuildError(f"no C compiler '{told}' found; install gcc or clang, or set CC")
    return compiler, _version(tuple(compiler))


@lru_cache(maxsize=8)
def _version(compiler: tuple[str, ...]) -> bytes:
    return _run([*compiler, "--version"], PATIENCE_VERSION)[1]


@lru_cache(maxsize=8)
def _target(compiler: tuple[str, ...]) -> tuple[tuple[str, ...], bytes]:
    """The compiler's flags for this processor, and the instructions that it then uses.

    These are the macros that it defines. They identify the processor on every system if several share a home folder.
    """
    for native in NATIVE:
        status, macros = _run([*compiler, native, "-dM", "-E", "-xc", os.devnull], PATIENCE_VERSION)
        if status == 0:
            return (native,), macros
    return (), b""


def _texts(source: Path) -> list[bytes]:
    """A C file's text and those of all it includes from here."""
    text = source.read_bytes()
    included = re.findall(rb'#include "(.+)"', text)
    return [text, *(part for name in included for part in _texts(source.parent / os.fsdecode(name)))]


def _compile(command: list[str], source: Path, made: Path) -> None:
    """Compile `source` to the library `made`. Raises BuildError with the compiler's own words."""
    status, printed = _run([*command, "-o", str(made), str(source)], PATIENCE)
    if status == 0 and made.is_file():
        return
    lines = printed.decode(errors="replace").strip().splitlines() or ["no message"]
    told = next((line for line in lines if "error" in line), lines[0]) if status else "it made no library"
    raise BuildError(f"'{shown(shlex.join([*command, source.name]), 200)}' failed: {shown(told, 200)}")


def _run(command: list[str], patience: float) -> tuple[int, bytes]:
    """A compiler's exit status and what it printed. Raises BuildError for one that hangs or prints without end."""
    compiler = tuple(command[:1])
    told = shown(command[0])
    if compiler in _hanging:
        raise BuildError(f"the C compiler '{told}' did not end; set CC to another")
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except (OSError, ValueError) as error:
        raise BuildError(f"the C compiler '{told}' cannot be run ({shown(error, 200)}); set CC to another") from None
    try:
        printed = _printed(process, patience)
        return process.wait(timeout=0 if printed is None else PATIENCE_VERSION), printed or b""
    except subprocess.TimeoutExpired:
        _hanging.add(compiler)
        raise BuildError(
            f"the C compiler '{told}' did not end within {patience:.0f} seconds, or printed without end; set CC to another"
        ) from None
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout
        process.stdout.close()


def _printed(process: subprocess.Popen, patience: float) -> bytes | None:
    """The output of a process until its end; None if it takes too long or prints too much."""
    printed, deadline, output = b"", time.monotonic() + patience, process.stdout
    assert output is not None
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            ended = process.poll() is not None  # its children may hold the pipe open
            if not selector.select(0 if ended else min(0.1, patience)):
                if ended:
                    return printed
                continue
            part = os.read(output.fileno(), 2**16)
            printed += part
            if not part:
                return printed
            if len(printed) > MOST_PRINTED:
                return None
    return None
