"""The folder of compiled kernels, and compilers that misbehave: no library of another user is loaded, nothing hangs or crashes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from c_kernels import needs_x86
from pamm.ops import kernel_cache
from pamm.ops.compiled import Kernel
from runs import wait_until

SOURCE = """
void use_large_pages(void *memory, long bytes) {}
int vector_lanes(void) { return 8; }
int answer(void) { return 42; }
"""
PLANTED = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void planted(void) {
    FILE *file = fopen(getenv("PAMM_TEST_RAN"), "w");
    if (file) fclose(file);
}
void use_large_pages(void *memory, long bytes) {}
int vector_lanes(void) { return 8; }
int answer(void) { return 13; }
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="C kernels need POSIX")
needs_root = pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where compiled kernels are kept."""
    for name, value in {
        "XDG_CACHE_HOME": tmp_path / "cache",
        "PAMM_KERNELS": "on",
        "PAMM_TEST_RAN": tmp_path / "ran",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "kernel.c").write_text(
        f"// {tmp_path}: the system loads a library of one name once in a process\n{SOURCE}"
    )
    return tmp_path / "cache" / "pamm" / "kernels"


def declare(library: ctypes.CDLL) -> None:
    library.answer.restype = ctypes.c_int


def kernel(folder: Path) -> Kernel:
    """The kernel as a new process sees it."""
    return Kernel(folder.parents[2] / "kernel.c", declare)


def answer(folder: Path) -> int:
    found = kernel(folder)
    assert found.unavailable() is None, found.unavailable()
    return found.library().answer()


def plant(folder: Path) -> Path:
    """Put a library that tells when it is loaded in the place of the kept one, with its digest."""
    assert answer(folder) == 42
    (target,) = folder.glob("*.so")
    target.unlink()
    subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-", "-o", str(target)], input=PLANTED, text=True, check=True)
    (folder / f"{target.name}.sha256").write_text(hashlib.sha256(target.read_bytes()).hexdigest())
    target.chmod(0o700)
    return target


def ran(folder: Path) -> bool:
    return (folder.parents[2] / "ran").exists()


def test_the_folder_and_what_is_in_it_are_the_user_s_alone(folder):
    assert answer(folder) == 42
    assert {path.stat().st_mode & 0o077 for path in (folder, folder.parent, *folder.iterdir())} == {0}


def test_a_kept_library_is_used_again(folder):
    assert answer(folder) == 42
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) == 2
    assert answer(folder) == 42
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["cut", "empty", "one bit", "no digest", "other digest", "folder", "link", "pipe"])
def test_a_damaged_library_is_compiled_again(damage, folder):
    assert answer(folder) == 42
    (library,) = folder.glob("*.so")
    digest, content = folder / f"{library.name}.sha256", library.read_bytes()
    damaged = {
        "cut": content[:5000],
        "empty": b"",
        "one bit": content[:9000] + bytes([content[9000] ^ 1]) + content[9001:],
    }
    if damage in damaged:
        library.unlink()  # this process has loaded it: what lies in its memory stays whole
        library.write_bytes(damaged[damage])
        library.chmod(0o700)
    elif damage == "no digest":
        digest.unlink()
    elif damage == "other digest":
        digest.write_bytes(b"\xff\x00")
    else:
        library.unlink()
        make = {
            "folder": library.mkdir,
            "link": lambda: library.symlink_to("/bin/sh"),
            "pipe": lambda: os.mkfifo(library),
        }
        make[damage]()
    assert answer(folder) == 42
    if damage != "folder":  # which stays where it is: the kernel is compiled and not kept
        assert not library.is_symlink() and library.read_bytes() == content


@pytest.mark.parametrize("which", ["kernels", "pamm", "library"])
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777])
def test_what_others_may_write_is_refused(which, mode, folder):
    target = plant(folder)
    {"kernels": folder, "pamm": folder.parent, "library": target}[which].chmod(mode)
    assert answer(folder) == 42
    assert not ran(folder)
    if which != "library":
        assert "may be written by other users; " in kernel_cache.objection()
        assert "chmod go-w" in kernel_cache.objection()


@needs_root
@pytest.mark.parametrize("which", ["kernels", "pamm", "library", "digest", "all"])
def test_what_another_user_planted_is_not_loaded(which, folder):
    target = plant(folder)
    digest = folder / f"{target.name}.sha256"
    given = {"kernels": [folder], "pamm": [folder.parent], "library": [target], "digest": [digest]}
    given["all"] = [folder, folder.parent, target, digest]
    for path in given[which]:
        os.chown(path, 12345, 12345)
    assert answer(folder) == 42
    assert not ran(folder)
    if which in ("library", "digest"):
        assert target.stat().st_uid == digest.stat().st_uid == 0
    else:
        assert "belongs to another user (number 12345)" in kernel_cache.objection()


@needs_root
def test_another_user_s_link_is_not_followed(folder, tmp_path):
    plant(folder)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    os.chown(folder, 12345, 12345, follow_symlinks=False)
    assert answer(folder) == 42
    assert not ran(folder)


@needs_root
def test_root_leaves_no_folder_of_its_own_in_another_user_s_cache(folder):
    folder.parent.mkdir(parents=True)
    os.chown(folder.parent, 12345, 12345)
    assert answer(folder) == 42
    assert not list(folder.parent.iterdir())


def test_the_planted_library_would_have_told(folder):
    """The counterpart of the tests above: a library of one's own in a folder of one's own is loaded."""
    plant(folder)
    assert answer(folder) == 13
    assert ran(folder)


def is_group(number: int) -> bool:
    """Whether a process group has processes."""
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("cc 'unbalanced", "no command (No closing quotation)"),
        ("", "no C compiler '' found"),
        ("   ", "no C compiler '' found"),
        ("/", "no C compiler '/' found"),
        ("/etc/hostname", "/etc/hostname"),
        ("true", "it made no library"),
        ("cat", "failed: "),
        ("\udcff\udcfe", r"no C compiler '\xff\xfe' found"),
        ("a\x1b[31mb", r"no C compiler 'a\x1b[31mb' found"),
    ],
)
def test_an_odd_command_gives_a_reason(compiler, reason, folder, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    assert reason in kernel(folder).unavailable()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (r"printf '\377\376 error \033[31m\n'; exit 1", r"failed: �� error \x1b[31m"),
        ("while :; do echo without end; done", "or printed without end"),
        ("exec 1>&- 2>&-; exit 3", "failed: no message"),
        ('while [ "$1" != -o ]; do shift; done; echo no library > "$2"', "file too short"),
        ('while [ "$1" != -o ]; do shift; done; echo "int one;" | cc -shared -xc - -o "$2"', "undefined symbol"),
    ],
    ids=["bytes that are no text", "prints forever", "silent", "writes no library", "writes another library"],
)
def test_a_misbehaving_compiler_gives_a_reason(text, reason, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, text))
    assert reason in kernel(folder).unavailable()
    assert not list(folder.glob("pamm-*"))


def test_a_file_that_cannot_be_run_gives_a_reason(folder, tmp_path, monkeypatch):
    path = Path(script(tmp_path, ""))
    path.write_bytes(b"\x7fELF nothing")
    monkeypatch.setenv("CC", str(path))
    assert "cannot be run" in kernel(folder).unavailable()


def test_a_hanging_compiler_and_its_children_are_ended_once_for_all_kernels(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cache, "PATIENCE_VERSION", 1.0)
    monkeypatch.setenv("CC", script(tmp_path, f"echo $$ >> {tmp_path}/started; sleep 1000 & sleep 1000"))
    assert "did not end within 1 seconds" in kernel(folder).unavailable()
    assert "did not end" in kernel(folder).unavailable()
    (started,) = (tmp_path / "started").read_text().split()
    wait_until(lambda: not is_group(int(started)))


@pytest.mark.slow
def test_the_doctor_tells_that_kernels_are_not_kept(folder):
    folder.mkdir(parents=True)
    folder.parent.chmod(0o777)
    command = [sys.executable, "-m", "pamm", "doctor"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PAMM_KERNELS": "off"}
    )
    assert f"compiled anew by every process: {folder.parent} may be written by other users" in done.stdout


@pytest.mark.slow
def test_processes_that_compile_at_once_leave_one_sound_library(folder, tmp_path):
    code = (
        f"from pathlib import Path; from pamm.ops import kernel_cache\n"
        f"assert kernel_cache.load(Path({str(tmp_path / 'kernel.c')!r})).answer() == 42"
    )
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in started] == [0] * 2
    (library,) = folder.glob("*.so")
    assert sorted(folder.iterdir()) == [library, folder / f"{library.name}.sha256"]
    before = library.stat().st_ino
    assert answer(folder) == 42
    assert library.stat().st_ino == before


def test_without_a_cache_the_kernel_still_runs(folder, tmp_path, monkeypatch):
    """Neither the cache nor the home can be written: a temporary folder serves, readable by nobody else."""
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("HOME", "/dev/null")
    assert answer(folder) == 42


def python(*code: str, **options) -> subprocess.Popen:
    """Another process that runs lines of code."""
    lines = ["from pathlib import Path", "from pamm.ops import kernel_cache", *code]
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)], text=True, stdout=subprocess.PIPE, **options)


def test_the_first_compilation_is_told_in_one_line(folder, tmp_path):
    (tmp_path / "other.c").write_text(SOURCE)
    load = [f"kernel_cache.load(Path({str(tmp_path / name)!r}))" for name in ("kernel.c", "other.c")]
    for told in (["compiling the C kernels, some seconds"], []):
        out, errors = python(*load, stderr=subprocess.PIPE).communicate()
        assert (out, errors.splitlines()) == ("", told)


def test_the_libraries_used_last_are_kept_and_those_in_use(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cache, "KEPT", 2)
    source = tmp_path / "kernel.c"
    text = source.read_text()
    versions = [f"{text}// version {number}\n" for number in range(5)]
    libraries = []

    def note_the_new_one() -> None:
        (new,) = set(folder.glob("*.so")) - set(libraries)
        libraries.append(new)

    load = f"kernel_cache.load(Path({str(source)!r}))"
    with python("while input():", f" {load}", " print(flush=True)", stdin=subprocess.PIPE) as earlier:
        for version in versions[:3]:
            source.write_text(version)
            earlier.stdin.write("go on\n")
            earlier.stdin.flush()
            earlier.stdout.readline()
            note_the_new_one()
        earlier.communicate("\n")
    cut_off = folder / "pamm-cut-off"
    cut_off.mkdir()
    os.utime(cut_off, (0, 0))
    source.write_text(versions[0])
    with python(load, "print(flush=True)", "input()", stdin=subprocess.PIPE) as user:
        user.stdout.readline()
        for last_use, library in enumerate(libraries):
            os.utime(library, (last_use, library.stat().st_mtime))
        source.write_text(versions[3])
        assert answer(folder) == 42
        note_the_new_one()
        assert sorted(folder.glob("*.so")) == sorted(libraries[i] for i in (0, 2, 3))
        user.communicate("\n")
    source.write_text(versions[4])
    assert answer(folder) == 42
    note_the_new_one()
    kept = sorted(f"{library.name}{suffix}" for library in libraries[3:] for suffix in ("", ".sha256"))
    assert sorted(path.name for path in folder.iterdir()) == kept


@needs_x86
def test_machines_with_other_processors_have_libraries_of_their_own(folder, tmp_path, monkeypatch):
    """They may share a home folder. Here a compiler of one name stands for that of two machines."""
    monkeypatch.setenv("CC", str(tmp_path / "compiler"))
    for number, flags in enumerate(["", "-mno-avx512f -mno-avx"], 1):
        script(tmp_path, f'exec cc "$@" {flags}')
        python(f"kernel_cache.load(Path({str(tmp_path / 'kernel.c')!r}))").communicate()
        assert len(list(folder.glob("*.so"))) == number
