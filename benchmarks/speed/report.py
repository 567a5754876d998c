"""`pamm bench report`: JSON lines → a page of tables and plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pamm.files import replace_text
from speed.plots import Bar, bars, curves
from speed.record import HEADINGS, amount, cells, duration, read

Line = Mapping[str, Any]

TITLES = {
    "scan": "The selective scan",
    "layers": "Layers with C kernels",
    "model": "Prediction",
    "train": "A training step",
    "scaling": "How the cost grows",
    "data": "Reading training data",
}

NOTES = {
    "scan": (
        "`recurrence` is the published reference recurrence in plain torch; `mambapy` the parallel scan of mamba.py. "
        "Both scan one permuted copy per order; their backward pass runs order by order, so that the states of one "
        "order at a time are kept. The floor is three vector operations and one exponential (shared by orders with "
        "common parameters) per state-step, at the rates measured in the same run."
    ),
    "layers": (
        "One layer of one image. `torch`: its products, attention and convolutions; a head with its large map, which where no "
        "gradient is needed is made tile by tile, and the taps multiplied by a convolution; for `experts` it sums the "
        "kernels of one image and convolves with the sum. GFLOP of `pamm`: what the kernel multiplies; of `torch`: of a direct "
        "convolution."
    ),
    "model": (
        "`plain` is the same function on the same weights, tasks and experts in loops and the head's 3×3 convolution on "
        "the ×4 map; `engine` scans with this package's engine, `recurrence` with the published recurrence. FLOP: of "
        "matrix products and convolutions, those that are carried out. Weights are random, and a router that keeps the k largest "
        "jumps where two are equal to the last digit: one task may then differ by far more than rounding."
    ),
    "train": (
        "Forward, losses, backward, optimizer; random images and labels. Memory holds the gradients and the optimizer's state. "
        "`plain, recurrence` keeps what autograd keeps of the published recurrence, which grows with every position, and fits no "
        "larger image here. `pamm, recomputed`: with `train.recompute`. The plain forms' backbone is this package's."
    ),
    "scaling": (
        "Decoder and heads of pascal-pamm-b, one image; what does not vary is 1024 tokens, five tasks, 15 experts, "
        "state size 64. Dashed: proportional."
    ),
    "data": ("The training loader: reading, zoom, crop, colour, batch."),
}


def write(results: Sequence[Path], out: Path) -> list[Path]:
    """README.md and its plots in the folder `out`, from files of results. Raises BenchError. Returns what was written."""
    lines = newest(line for path in results for line in read(path))
    out.mkdir(parents=True, exist_ok=True)
    text = ["# Benchmarks", "", "Written by `pamm bench report`; measured by `pamm bench all` (`make bench`).", ""]
    text += [f"- {machine}" for machine in machines(lines)]
    written = []
    for kind, title in TITLES.items():
        own = [line for line in lines if line["bench"] == kind]
        if not own:
            continue
        text += ["", f"## {title}", "", NOTES[kind], ""]
        for name, picture in pictures(kind, own).items():
            replace_text(out / name, picture)
            written.append(out / name)
            text += [f"![{title}]({name})", ""]
        text += markdown(own)
    replace_text(out / "README.md", "\n".join(text) + "\n")
    return [out / "README.md", *written]


def newest(lines: Iterable[Line]) -> list[Line]:
    """Of measurements of the same thing on the same machine the last one, in the order of their first."""
    found: dict[tuple, Line] = {}
    for line in lines:
        machine = line["machine"] or {}
        same = ("bench", "case", "what", "candidate", "dtype", "device", "allocator", "threads")
        found[(*(line[key] for key in same), str(line["shape"]), machine.get("cpu"), machine.get("gpu"))] = line
    return list(found.values())


def machines(lines: Sequence[Line]) -> list[str]:
    """Every machine, version and commit that the lines were measured with."""
    told = {}
    for line in lines:
        m = line["machine"]
        gpu = f", {m['gpu']}" if m["gpu"] else ""
        units = "with" if m["matrix_units"] else "without"
        key = (
            f"{m['cpu']} ({m['capability']}, {units} matrix units), {m['cores']} cores, {amount(m['memory'] or 0)}{gpu}"
        )
        told[f"{key}; torch {m['torch']}; commit {m['commit']}; {m['date'][:10]}"] = None
    return list(told)


def name_of(line: Line) -> str:
    """The case with what tells it from others of its kind."""
    dtype = "" if line["dtype"] in (None, "float32") else f", {line['dtype']}"
    device = "" if line["device"] == "cpu" else f", {line['device']}"
    allocator = ", system's allocator" if line["allocator"] == "system" else ""
    per_order = ", per order" if line["shape"].get("per_order") else ""
    return f"{line['case']}, {line['what']}{dtype}{device}{per_order}{allocator}"


def markdown(lines: Sequence[Line]) -> list[str]:
    """The records as a table; memory is what the work needs of all that the process held."""
    rows = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    for line in lines:
        row = list(cells(line))
        row[1] += "" if line["dtype"] in (None, "float32") else f", {line['dtype']}"
        rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |")
    return rows


def pictures(kind: str, lines: Sequence[Line]) -> dict[str, str]:
    """File name → SVG."""
    measured = [line for line in lines if line["seconds"]]
    if not measured:
        return {}
    if kind == "scaling":
        axes = dict.fromkeys(line["what"] for line in measured)
        return {
            f"scaling_{axis}.svg": growth(axis, [line for line in measured if line["what"] == axis]) for axis in axes
        }
    groups: dict[str, list[Bar]] = {}
    for line in measured:
        seconds = line["seconds"]
        groups.setdefault(name_of(line), []).append(
            (line["candidate"], seconds["median"], seconds["q1"], seconds["q3"])
        )
    return {f"{kind}.svg": bars(f"{TITLES[kind]}: median time", groups, duration)}


def growth(axis: str, lines: Sequence[Line]) -> str:
    """Time over one quantity, a curve per candidate."""
    series: dict[str, list[tuple[float, float]]] = {}
    for line in sorted(lines, key=lambda line: line["shape"]["value"]):
        series.setdefault(line["candidate"], []).append((line["shape"]["value"], line["seconds"]["median"]))
    return curves(f"Time over {axis}", axis, series, duration)
