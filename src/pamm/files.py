"""Files for users: text that is written whole or not at all, and names made of what they hold."""

import os
import re
from collections.abc import Iterable
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, a kill or a full disk finds either the old file or the new one."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    finally:
        new.unlink(missing_ok=True)


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
