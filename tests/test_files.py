"""Text from outside as it is shown, and files that are written whole."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pamm
from pamm.files import replace_text, replacing, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("straße 路 – été.png", "straße 路 – été.png"),
        ("\x1b[2J\x07red", r"\x1b[2J\x07red"),
        ("two\nlines\r\t\x85\u2028", r"two\nlines\r\t\x85\u2028"),
        ("gpj\u202egnp.\u200b", r"gpj\u202egnp.\u200b"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png"),
        ("\ud800", r"\ud800"),
        (17, "17"),
        ("", ""),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text, expected):
    assert shown(text) == expected


def test_a_long_text_loses_its_middle():
    assert shown("a" * 50 + "b" * 50, 11) == "aaaaa…bbbbb"
    assert shown("abc", 3) == "abc" and shown("abcd", 3) == "a…d" and shown("abcd", 1) == "…"
    assert shown("x" * 10**7 + ".png").endswith("x.png") and shown("\x1b" * 90).startswith(r"\x1b")


@given(st.text(st.characters(codec=None, exclude_categories=())), st.integers(1, 100))
def test_any_text_becomes_one_short_line_that_can_be_encoded(text, most):
    line = shown(text, most)
    assert len(line) <= most and line.isprintable()
    line.encode("utf-8")
    if text.isprintable() and len(text) <= most:
        assert line == text


WRITE = """
import os, sys, pathlib, tempfile
sys.path[:0] = [{source!r}]
from pamm.files import cache_folder
if {user}:  # only now: a home that is root's may hold the interpreter
    os.setgid({user})
    os.setuid({user})
folder = cache_folder("things")
(folder / "a").write_text("a")
if os.fork() == 0:
    sys.exit()
os.wait()
assert (folder / "a").exists(), "a forked child removed its parent's folder"
print(folder)
"""


def cache_of(environment: dict[str, str | None], cwd: Path, user: int = 0) -> Path:
    """The folder that a process with these variables (None: unset) writes to."""
    base = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    base |= {k: v for k, v in environment.items() if v is not None}
    code = WRITE.format(source=str(Path(pamm.__file__).parents[1]), user=user)
    done = subprocess.run([sys.executable, "-c", code], env=base, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_the_cache_lies_where_the_user_says_or_in_a_temporary_folder(tmp_path):
    home, other, file = tmp_path / "home", tmp_path / "other", tmp_path / "file"
    file.touch()
    home.mkdir()
    assert cache_of({"HOME": str(home)}, tmp_path) == home / ".cache" / "pamm" / "things"
    assert cache_of({"HOME": str(home), "XDG_CACHE_HOME": str(other)}, tmp_path) == other / "pamm" / "things"
    # a relative one counts as none; and one that cannot be made gives way to the next
    for value in ("relative", str(file)):
        assert cache_of({"HOME": str(home), "XDG_CACHE_HOME": value}, tmp_path) == home / ".cache" / "pamm" / "things"
    (tmp_path / "tmp").mkdir()
    for nowhere in ({"HOME": str(file)}, {"HOME": "relative"}):
        found = cache_of(nowhere | {"TMPDIR": str(tmp_path / "tmp")}, tmp_path)
        assert found.parent.parent == tmp_path / "tmp" and not found.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "home", "other", "tmp"]
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("user", [65534, 54321], ids=["nobody", "a number without a name"])
def test_a_user_without_a_home_has_a_temporary_cache(tmp_path, user):
    closed = tmp_path / "closed"  # to all but root
    closed.mkdir(mode=0o700)
    for environment in ({}, {"HOME": str(closed / "none")}, {"HOME": str(closed), "XDG_CACHE_HOME": f"{closed}/cache"}):
        assert cache_of(environment, Path("/"), user).parent.parent == Path(tempfile.gettempdir())


def test_a_file_is_replaced_whole_and_has_the_umasks_mode(tmp_path):
    path = tmp_path / "a.txt"
    previous = os.umask(0o027)
    try:
        replace_text(path, "first")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(ZeroDivisionError), replacing(path) as new:
        new.write_text("sec")
        raise ZeroDivisionError
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]
    replace_text(tmp_path / ("n" * 251 + ".txt"), "the longest name")
    with pytest.raises(OSError, match="nowhere") as told, replacing(tmp_path / "nowhere" / "a.txt") as new:
        new.write_text("x")
    assert told.value.filename == str(tmp_path / "nowhere" / "a.txt")
