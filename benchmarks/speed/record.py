"""Results: what one is, as a JSON line and as a line of a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pamm.drawing.table import Table
from speed import BenchError

FIELDS = (
    "bench", "case", "what", "candidate", "shape", "dtype", "device", "allocator", "threads", "seconds", "ratio",
    "images_per_second", "memory", "flops", "gemm_share", "floor_share", "state_steps_per_second", "difference", "limits",
    "error", "machine",
)  # fmt: skip
"""Every JSON line has these; those that do not apply are null. Units: seconds, bytes, operations per second.

allocator: "keep" where freed memory stays with the process (`pamm.runtime.memory`), else "system". seconds: {median, q1, q3, calls,
cold}, cold where the one call was the first. ratio: median over that of the case's first candidate. memory: {peak, before,
working}. flops: of matrix products and convolutions. gemm_share: flops / seconds over the
rate of a large matrix product or 3×3 convolution of this dtype, whichever is faster, measured beside it. floor_share: least
possible time over the median. limits: what these are measured against. difference: largest difference of the output from the
first candidate's, relative to its largest value.
"""


def records(bench: str, case: str, what: str, job: Mapping[str, Any], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record per candidate of a case that was run. `found`: see `speed.child`."""
    settings, limits = job["settings"], found.get("limits") or {}
    first = next(iter(found["candidates"].values()))
    lines = []
    for name, timing in found["candidates"].items():
        median = (timing["seconds"] or {}).get("median")
        flops, base = timing["flops"] or None, (first["seconds"] or {}).get("median")
        line = {
            "shape": found["shape"],
            "dtype": settings["dtype"],
            "device": settings["device"],
            "allocator": settings["allocator"],
            "threads": found["threads"],
            "seconds": timing["seconds"],
            "memory": found["memories"].get(name),
            "flops": flops,
            "difference": timing["difference"],
            "limits": limits or None,
            "error": timing["error"],
        }
        if median:
            line |= {
                "ratio": median / base if base else None,
                "images_per_second": found["images"] / median if found["images"] else None,
                "gemm_share": flops / median / limits["gemm"] if flops and "gemm" in limits else None,
                "floor_share": limits["floor"]["seconds"] / median if limits.get("floor") else None,
                "state_steps_per_second": found["steps"] / median if found["steps"] else None,
            }
        lines.append(complete(line | {"bench": bench, "case": case, "what": what, "candidate": name}))
    return lines


def complete(line: Mapping[str, Any]) -> dict[str, Any]:
    """The record with every field, in order; the machine is filled in by the caller."""
    return {name: line.get(name) for name in FIELDS}


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add JSON lines to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file. Raises BenchError for a file that holds none."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}; `pamm bench ... --out FILE` writes such a file") from None
    except ValueError:
        lines = []
    if not lines or any(not isinstance(line, dict) or set(FIELDS) - set(line) for line in lines):
        raise BenchError(f"{path} holds no results; expected JSON lines as `pamm bench ... --out FILE` writes them")
    return lines


HEADINGS = ("case", "what", "candidate", "median", "middle half", "ratio", "memory", "notes")


def cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    """A record as one row under HEADINGS."""
    seconds, memory = line["seconds"], line["memory"]
    if line["bench"] == "data" and seconds:
        notes = [f"{line['images_per_second']:.1f} images/s"]
    else:
        notes = list(_notes(line))
    dtype = "" if line["dtype"] in (None, "float32") else f", {line['dtype']}"
    return (
        line["case"],
        line["what"] + dtype,
        line["candidate"],
        duration(seconds["median"]) if seconds else "–",
        f"{duration(seconds['q1'])} … {duration(seconds['q3'])}, {seconds['calls']}×" if seconds else "–",
        f"{line['ratio']:.3g}" if line["ratio"] else "–",
        f"{amount(memory['working'])} of {amount(memory['peak'])}" if memory else "–",
        "; ".join(notes),
    )


def _notes(line: Mapping[str, Any]) -> Iterable[str]:
    if line["shape"].get("per_order"):
        yield "parameters per order"
    if line["shape"].get("dead_branch") and line["candidate"].startswith("plain"):
        yield "dead branch computed, as published"
    if line["allocator"] == "system":
        yield "system's allocator"
    if line["floor_share"]:
        yield f"{line['floor_share']:.0%} of the floor"
    if line["flops"]:
        share = f", {line['gemm_share']:.0%} of the GEMM rate" if line["gemm_share"] else ""
        yield f"{line['flops'] / 1e9:.0f} GFLOP{share}"
    if line["difference"] is not None:
        yield f"differs by {line['difference']:.0e}"
    if line["seconds"] and line["seconds"]["cold"]:
        yield "first call only"
    if line["error"]:
        yield f"failed: {line['error']}"


def duration(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def amount(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Records as a table. Ratio: over the first row. Memory: what the work needs, of all that the process held."""
    return Table([HEADINGS, *(cells(line) for line in lines)], align="<")
