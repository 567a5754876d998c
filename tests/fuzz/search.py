"""The search for inputs that a reader does not bear, for one reader in a process of its own."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fuzz import guard
from fuzz.parsers import PARSERS, sandbox
from pamm.files import distinct_stem


def search(name: str, inputs: int, number: int) -> tuple[int, int, str | None]:
    """Inputs tried, inputs taken, and the failure that was found, if any."""
    parser, counts, inputs_of = PARSERS[name], [0, 0], PARSERS[name].inputs()
    for content in parser.sound():  # what is loaded once does not count as memory of an input
        with sandbox() as folder, guard.guarded(folder):
            parser.try_on(content, folder)
    guard.limit_memory()
    before, smallest = guard.memory_taken(), [None]

    @seed(number)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        content = data.draw(inputs_of)
        smallest[0] = content
        counts[0] += 1
        with sandbox() as folder, guard.guarded(folder):
            counts[1] += parser.try_on(content, folder)

    failure = None
    try:
        run()
    except BaseException:
        kept = Path(tempfile.gettempdir()) / f"pamm-fuzz-{distinct_stem(name, set())}-{number}"
        kept.write_bytes(smallest[0])
        failure = f"{traceback.format_exc(limit=-8)[:6000]}\nthe input: {kept}"
    grown = guard.memory_taken() - before
    if failure is None and grown > guard.BYTES:
        failure = f"{grown / 2**30:.1f} GB of memory"
    return counts[0], counts[1], failure
