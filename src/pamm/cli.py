"""The command `pamm`."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path

from pamm import PammError
from pamm.command_line import COMMANDS, leave_lost_output, print_any_character, say
from pamm.files import shown


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand. Returns the exit code: 0 done, 1 the work failed, 2 the command line is wrong."""
    print_any_character()
    try:
        try:
            return run(sys.argv[1:] if arguments is None else arguments)
        finally:  # here, because Python itself reports a closed pipe or a full disk at its end in other words
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
    except KeyboardInterrupt as error:
        say(f"\npamm: {str(error) or 'interrupted'}")
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and leave_lost_output():
            if isinstance(error, BrokenPipeError):  # `pamm ... | head`: the reader has enough
                return 141
            say(f"pamm: standard output cannot be written ({error.strerror})")
            return 1
        if (text := told(error)) is None:
            raise
        say(f"pamm: {text}")
        return 1


def run(arguments: list[str]) -> int:
    """As `main`, without its handling of errors."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        import pamm

        print(f"pamm {pamm.__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        say(f"pamm: unknown command '{shown(arguments[0])}'\n\n{usage()}")
        return 2
    module, _, function = COMMANDS[arguments[0]][1].partition(":")
    return getattr(importlib.import_module(module), function)(arguments[1:])


def told(error: Exception) -> str | None:
    """The message for an error of this package, a missing extra, an error of a file, or a lack of memory; else None."""
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("pamm"):
        return f"{error}. Install the missing extra: pip install 'pamm[train,demo]'"
    if isinstance(error, OSError) and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return f"{shown(name, 300)}: {error.strerror}. Choose another place, or free space or permissions there"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # of a write, which names no file
        return f"{error.strerror}. Free some space, or write to another disk"
    if isinstance(error, PammError):
        return str(error)
    from pamm.runtime.workers import exhausted

    return exhausted(error)


def usage() -> str:
    """The text of `pamm --help`."""
    lines = "\n".join(f"  {name:<9} {help_line}" for name, (help_line, _) in COMMANDS.items())
    return (
        "usage: pamm COMMAND ...\n\n"
        "Multi-task dense prediction: one image in; segmentation, human parts, depth, surface normals, saliency and object\n"
        f"boundaries out.\n\ncommands:\n{lines}\n\n`pamm COMMAND --help` lists a command's arguments."
    )


def bench(arguments: list[str]) -> int:
    """Run `pamm bench` where the checkout of this package is there: benchmarks are no part of an installed package."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    if not (folder / "speed" / "command.py").is_file():
        say(
            "pamm: the benchmarks are in the repository, not in the installed package: clone it and run `make bench` there"
        )
        return 1
    sys.path.insert(0, str(folder))
    return importlib.import_module("speed.command").main(arguments)


if __name__ == "__main__":
    sys.exit(main())
