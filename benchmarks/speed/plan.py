"""What `pamm bench all` measures: the figures of benchmarks/speed, in some thirty minutes on two idle cores."""

from __future__ import annotations

RELEASED = ("--part", "decoder", "--plain", "engine", "recurrence", "--dead-branch")
"""As the published code computes: the branch whose output it throws away included."""

PLAN: tuple[tuple[str, ...], ...] = (
    ("scan", "nyud-b", "--rounds", "3", "--budget", "8"),
    ("scan", "nyud-b", "--what", "forward", "--rounds", "3", "--budget", "8", "--allocator", "system", "--no-memory"),
    ("scan", "pascal-l", "--what", "forward", "--rounds", "3", "--budget", "8"),
    ("scan", "pascal-l", "--what", "backward", "--plain", "mambapy", "--rounds", "2", "--budget", "8", "--no-memory"),
    ("scan", "nyud-b", "pascal-l", "--per-order", "--plain", "none", "--no-memory"),
    ("layers", "--budget", "5", "--no-memory"),
    ("layers", "--what", "backward", "--budget", "5", "--no-memory"),
    ("model", "nyud-pamm-released-b", *RELEASED, "--rounds", "3"),
    ("model", "pascal-pamm-released-l", *RELEASED, "--rounds", "2", "--no-memory"),
    ("model", "pascal-pamm-b", "--precision", "bf16", "--plain", "none"),
    ("model", "pascal-pamm-b", "--plain", "engine", "--rounds", "3"),
    ("model", "pascal-pamm-l", "--precision", "bf16", "--plain", "none"),
    ("model", "pascal-pamm-l", "--plain", "none", "--rounds", "3"),
    ("train", "pascal-pamm-b", "--plain", "engine", "--grad-checkpointing", "--rounds", "4", "--budget", "150"),
    ("train", "pascal-pamm-b", "--size", "128", "128", "--plain", "recurrence", "--rounds", "2", "--budget", "5"),
    ("train", "pascal-pamm-b", "--precision", "bf16", "--plain", "none", "--rounds", "4", "--budget", "60"),
    ("scaling", "pascal-pamm-b", "--rounds", "2", "--budget", "5", "--backbone"),
    ("data", "demo"),
)
"""Arguments of `pamm bench`, one measurement after the other."""
