"""Keeping freed memory on a CPU."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = 1 << 30


def keep_memory() -> None:
    """Let glibc keep blocks under 1 GiB when they are freed, instead of returning them to the system.

    A network allocates the same large maps step after step; returned blocks cost a page fault per page each time, which
    on a CPU takes as long as much of the arithmetic. Does nothing on other systems.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, KEPT)
        libc.mallopt(TRIM_THRESHOLD, KEPT)
