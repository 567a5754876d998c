"""A process that loaded or used a network, then forks: its children predict."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pamm

LIMIT_S = 120

PARENT = """
import os, sys
sys.path[:0] = [{source!r}, {tests!r}]
import numpy as np, torch
torch.set_num_threads(3)
from pamm import Predictor
from prediction.networks import create, photo
model = create({system!r})
predictor, image = Predictor(model, longest_side=320), photo(240, 320)
if {used}:
    predictor(image)
    torch.randn(800, 800) @ torch.randn(800, 800)
def maps(_=0):
    return {{task: values.tobytes() for task, values in predictor(image).items()}}
"""

FORK = """
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.write(writer, b"same" if maps() == maps() and torch.get_num_threads() == 1 else b"other")
    grandchild = os.fork()
    if grandchild == 0:
        maps()
        os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert os.read(reader, 9) == b"same"
assert torch.get_num_threads() == 3, "the parent keeps its threads"
print("done")
"""

POOL = """
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    found = pool.map(maps, range(4))
torch.set_num_threads(1)
expected = maps()
assert all(each == expected for each in found), "other bits than one thread gives here"
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize(
    ("system", "used", "work"),
    [("pamm", True, FORK), ("mtmamba", False, FORK), ("pamm-released", True, POOL)],
    ids=["used", "only loaded", "pool"],
)
def test_a_forked_child_predicts(system, used, work):
    tests = Path(__file__).parents[1]
    code = PARENT.format(source=str(Path(pamm.__file__).parents[1]), tests=str(tests), system=system, used=used) + work
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
