"""Printing to terminals, pipes and files of any encoding, open or closed."""

from __future__ import annotations

import codecs
import io
import os
import sys

from pamm.files import escape, escaped

PLAIN = dict(
    zip(
        "→←↑↓×–—−…≥≤±Δ§⊙",
        ["->", "<-", "^", "v", "x", "-", "-", "-", "...", ">=", "<=", "+-", "d", "S", "o"],
        strict=True,
    )
)
"""Signs of printed tables → what stands for them where the output's encoding has no such character."""


def say(text: str) -> None:
    """Print to standard error; what a terminal would obey, which may come from a file's name, is escaped."""
    print(escaped(text, keep="\n"), file=sys.stderr)


def print_any_character() -> None:
    """From now on a character that the output cannot encode, among them bytes of a file's name, is replaced and no error."""

    def replace(error: UnicodeError) -> tuple[str, int]:
        signs = error.object[error.start : error.end]
        return "".join(PLAIN.get(sign) or escape(sign) for sign in signs), error.end

    codecs.register_error("pamm", replace)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="pamm")


def leave_lost_output() -> bool:
    """Whether standard output or error cannot be written, tried with a line end; what waits to be written is then dropped."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and hasattr(stream, "buffer")]
    for stream in streams:
        try:
            place = stream.fileno()
            stream.flush()
            os.write(place, b"\n")
        except io.UnsupportedOperation:  # a stream in memory
            continue
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            places = [other.fileno() for other in streams]
            for lost in [other for other in places if os.path.sameopenfile(other, place)]:  # both after `2>&1`
                os.dup2(nowhere, lost)
            os.close(nowhere)
            return True
    return False
