"""Whatever a file of a stranger holds, its reader takes it or raises this package's own error, and does nothing else.

`make fuzz` tries many more inputs than these (see `__main__.py`).
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.guard import guarded
from fuzz.parsers import PARSERS, sandbox

FEW = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


@pytest.fixture(autouse=True)
def cache_inside(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("name", PARSERS)
def test_sound_files_are_taken(name):
    parser = PARSERS[name]
    for content in parser.sound():
        with sandbox() as folder, guarded(folder):
            assert parser.try_on(content, folder) or name == "image of other formats"


@pytest.mark.parametrize("name", PARSERS)
def test_a_damaged_file_is_told_and_nothing_else_happens(name):
    parser = PARSERS[name]

    @FEW
    @given(st.data())
    def run(data: st.DataObject) -> None:
        content = data.draw(parser.inputs())
        with sandbox() as folder, guarded(folder):
            parser.try_on(content, folder)

    run()
