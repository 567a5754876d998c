"""`make fuzz`: at least so many inputs for all readers together, each reader in a process of its own with little memory.

    python -m fuzz --inputs 12000 --seed 1     from the folder tests/

Prints a line per reader, and for a failure its traceback and the file with the smallest input that was found.
Ends with code 1 after a failure.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

from fuzz.parsers import PARSERS
from fuzz.search import search


def main() -> int:
    own = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    own.add_argument("--inputs", type=int, default=12_000, help="of all readers together")
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--only", help="readers, comma-separated")
    given_ = own.parse_args()
    names = given_.only.split(",") if given_.only else list(PARSERS)
    each = -(-given_.inputs // len(names))
    failed, total, begin = 0, 0, time.monotonic()
    context = multiprocessing.get_context("spawn")
    for name in names:
        start = time.monotonic()
        with context.Pool(1) as pool:
            result = pool.apply_async(search, (name, each, given_.seed))
            while not result.ready():
                result.wait(1)
                if not all(process.is_alive() for process in pool._pool):
                    break
            tried, taken, failure = (
                result.get() if result.ready() else (0, 0, "the process died; its traceback stands above")
            )
        total += tried
        failed += failure is not None
        told = f"FAILED\n{failure}" if failure else "sound"
        print(f"{name:<26} {tried:>6} inputs, {taken:>6} taken, {time.monotonic() - start:>6.0f} s  {told}", flush=True)
    print(
        f"{total} inputs for {len(names)} readers in {(time.monotonic() - begin) / 60:.1f} minutes, {failed} failures"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    warnings.simplefilter("error")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        sys.exit(main())
