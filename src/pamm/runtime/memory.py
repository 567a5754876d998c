"""Keeping freed memory on a CPU."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
NEVER = -1
LARGEST = (1 << 30, 32 << 20)
"""Sizes tried in turn, bytes: some versions of glibc take no more than the second."""


def keep_memory() -> None:
    """Let glibc keep blocks (under 1 GiB) when they are freed, instead of returning them to the system.

    A network allocates the same large maps step after step; returned blocks cost a page fault per page each time, which
    on a CPU takes as long as much of the arithmetic. Does nothing on other systems.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if any(libc.mallopt(MMAP_THRESHOLD, size) for size in LARGEST):
            libc.mallopt(TRIM_THRESHOLD, NEVER)
