"""What `pamm bench all` measures: the figures of benchmarks/speed, in some fifteen minutes on two idle cores."""

from __future__ import annotations

PLAN: tuple[tuple[str, ...], ...] = (
    ("scan", "nyud-b", "--rounds", "3", "--budget", "8"),
    ("scan", "nyud-b", "--what", "forward", "--rounds", "3", "--budget", "8", "--allocator", "system", "--no-memory"),
    ("scan", "pascal-l", "--what", "forward", "--rounds", "3", "--budget", "8"),
    ("scan", "pascal-l", "--what", "backward", "--plain", "mambapy", "--rounds", "2", "--budget", "8", "--no-memory"),
    ("scan", "nyud-b", "pascal-l", "--per-order", "--plain", "none", "--no-memory"),
    ("model", "nyud-pamm-released-b", "--part", "decoder", "--plain", "engine", "recurrence", "--rounds", "3"),
    ("model", "pascal-pamm-released-l", "--part", "decoder", "--plain", "engine", "recurrence", "--rounds", "2"),
    ("model", "pascal-pamm-b", "--dtype", "bf16", "--plain", "none"),
    ("model", "pascal-pamm-b", "--plain", "engine", "--rounds", "3"),
    ("model", "pascal-pamm-l", "--dtype", "bf16", "--plain", "none"),
    ("model", "pascal-pamm-l", "--plain", "none", "--rounds", "3"),
    ("train", "pascal-pamm-b", "--plain", "engine", "--rounds", "2"),
    ("scaling", "pascal-pamm-b", "--rounds", "2", "--budget", "5", "--backbone"),
    ("data", "demo"),
)
"""Arguments of `pamm bench`, one measurement after the other."""
