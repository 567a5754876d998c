"""Keeping freed memory: what it saves is page faults, which the system counts."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from pamm.runtime.memory import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
for _ in range(20):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Twenty maps of 64 MiB, one after the other; prints the page faults they cost.

Twenty before them: a small block that comes to lie in the hole of a large one makes the next large one take
new memory, a few times.
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="does nothing without glibc")
def test_a_large_map_after_another_costs_no_page_faults():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < faults("return") / 4
