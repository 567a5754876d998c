"""What the commands' argument parsers share."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below `smallest`."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"found '{text}', expected a whole number from {smallest} up")
        return int(text)

    return number
