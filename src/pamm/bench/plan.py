"""What `pamm bench all` measures: the figures of benchmarks/README.md, in some fifteen minutes on two cores."""

from __future__ import annotations

PLAN: tuple[tuple[str, ...], ...] = (
    ("scan", "nyud-b", "pascal-l", "--rounds", "3", "--budget", "12"),
    ("scan", "nyud-b", "--what", "forward", "--rounds", "3", "--budget", "12", "--allocator", "system", "--no-memory"),
    ("model", "nyud-pamm-released-b", "--part", "decoder", "--plain", "engine", "recurrence", "--rounds", "3"),
    # The recurrence takes minutes here: its first call is the measurement, and its memory is at least the engine's form's.
    ("model", "pascal-pamm-released-l", "--part", "decoder", "--plain", "recurrence", "--rounds", "3", "--no-memory"),
    ("model", "pascal-pamm-released-l", "--part", "decoder", "--plain", "engine", "--rounds", "3"),
    ("model", "pascal-pamm-b", "--dtype", "bf16", "--plain", "none", "--rounds", "5"),
    ("model", "pascal-pamm-b", "--plain", "engine", "--rounds", "3"),
    ("model", "pascal-pamm-l", "--dtype", "bf16", "--plain", "none", "--rounds", "5"),
    ("model", "pascal-pamm-l", "--plain", "none", "--rounds", "3"),
    ("train", "pascal-pamm-b", "--plain", "engine", "--rounds", "3"),
    ("scaling", "pascal-pamm-b", "--rounds", "2", "--budget", "10", "--backbone"),
    ("data", "demo"),
)
"""Arguments of `pamm bench`, one measurement after the other."""
