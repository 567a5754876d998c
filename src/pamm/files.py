"""Writing files completely or not at all, names of files, and the safe display of text from outside."""

import atexit
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new path to write; when the block ends without an error, that file takes `path`'s place.

    A reader, a kill or a full disk finds either the old file or the new one. Its mode is that of any new file, by the umask.
    An OSError of the block that names no file (a full disk) names `path` afterwards.
    """
    new = path.with_name(f".pamm-{os.urandom(6).hex()}.new")  # short: `path` may have the longest name there can be
    try:
        yield new
        os.replace(new, path)
    except OSError as error:
        if error.filename is None or os.fspath(error.filename) == os.fspath(new):
            error.filename = str(path)
        raise
    finally:
        new.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all (see `replacing`)."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def usual_mode(path: Path) -> None:
    """Give `path`, which a library wrote readable only for its owner, the mode of any new file there (umask or folder)."""
    probe = path.with_name(f".pamm-{os.urandom(6).hex()}.new")
    try:
        probe.touch(exist_ok=False)
        os.chmod(path, stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink(missing_ok=True)


def keep(path: Path, content: bytes) -> None:
    """Write a cache's file completely or not at all; a failure is no error."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            new.write_bytes(content)


def first_line(error: BaseException) -> str:
    """An error's message without what follows its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(text: object, most: int = 80) -> str:
    """Text from outside (a file's name, a value of a configuration) as one harmless line of at most `most` characters.

    What a terminal would obey or hide (escape and control characters, line ends, marks of writing direction) and bytes that
    are no text are written as escapes: `\\x1b`, `\\n`, `\\u202e`, `\\xff`. A longer text loses its middle, since a path's end says
    as much as its start.
    """
    whole = str(text)
    if len(whole) > most:  # before the escapes are made: a text may have any length
        whole = whole[: most + 1] + whole[-most:]
    line = escaped(whole)
    if len(line) <= most:
        return line
    head = most // 2
    tail = most - 1 - head
    return line[:head] + "…" + (line[-tail:] if tail > 0 else "")


def escaped(text: str, keep: str = "") -> str:
    """Every character that cannot be printed as an escape, those of `keep` as they are."""
    return "".join(c if c.isprintable() or c in keep else escape(c) for c in text)


def escape(character: str) -> str:
    """One character as ASCII: `\\x1b`, `\\u2192`; of a byte that is no text (see os.fsdecode) the byte."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def cache_folder(name: str) -> Path:
    """Where results that can be computed again are kept: $XDG_CACHE_HOME/pamm/`name`, by default ~/.cache/pamm/`name`.

    It exists and can be written. Where there is no home folder, or none that can be written, it is a temporary one of this
    process, removed at its end. Raises OSError where there is no such place either.
    """
    for base in (os.environ.get("XDG_CACHE_HOME", ""), os.path.join(os.environ.get("HOME") or _home(), ".cache")):
        if not os.path.isabs(base):  # so says the standard; and nothing is to appear in the working directory
            continue
        folder = Path(base) / "pamm" / name
        try:
            for part in (folder.parents[1], folder.parent, folder):  # only the user can read new ones
                part.mkdir(0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    folder = _temporary_folder() / name
    folder.mkdir(0o700, parents=True, exist_ok=True)
    return folder


def _home() -> str:
    """The user's home folder by the system's list of users, or "" where it has none."""
    try:
        return str(Path.home())
    except RuntimeError:
        return ""


@lru_cache(maxsize=1)
def _temporary_folder() -> Path:
    """A folder for this process and its children, removed when it ends (and not when a forked child does)."""
    import tempfile  # not above: the command line's help does not wait for it

    try:
        folder, owner = tempfile.mkdtemp(prefix="pamm-"), os.getpid()
    except OSError as error:
        error.filename = error.filename or os.environ.get("TMPDIR", "/tmp")
        raise
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return Path(folder)


def distinct_stem(name: str, taken: set[str]) -> str:
    """A file name without suffix made of any text, different from those `taken`, letter case apart; it is added to them."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip(".")[:100] or "image"
    stem, number = plain, 2
    while stem.casefold() in taken:
        stem, number = f"{plain}_{number}", number + 1
    taken.add(stem.casefold())
    return stem


def distinct_stems(names: Iterable[str]) -> dict[str, str]:
    """Name → file name, each different from the others."""
    taken: set[str] = set()
    return {name: distinct_stem(name, taken) for name in names}
