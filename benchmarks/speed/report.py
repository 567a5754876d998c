"""`pamm bench report`: JSON lines → a page of tables and plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pamm.drawing.plots import save_figure
from pamm.drawing.render import render
from pamm.files import replace_text
from speed.plots import Bar, bars, curves
from speed.record import amount, duration, read, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Line = Mapping[str, Any]

TITLES = {
    "scan": "The selective scan",
    "layers": "Layers with C kernels",
    "model": "Prediction",
    "train": "A training step",
    "scaling": "How the cost grows",
    "data": "Reading training data",
}


def write(results: Sequence[Path], out: Path) -> list[Path]:
    """README.md and its plots in the folder `out`, from files of results. Raises BenchError. Returns what was written."""
    lines = newest(line for path in results for line in read(path))
    out.mkdir(parents=True, exist_ok=True)
    written, sections = [out / "README.md"], {}
    for kind in TITLES:
        own = [line for line in lines if line["bench"] == kind]
        if own:
            drawn = plots(kind, own)
            for name, figure in drawn.items():
                save_figure(figure, out / name)
            written += [out / name for name in drawn]
            sections[kind] = {"plots": list(drawn), "table": table(own)}
    template = Path(__file__).with_name("report.md")
    replace_text(out / "README.md", render(template, machines=machines(lines), titles=TITLES, sections=sections))
    return written


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


def plots(kind: str, lines: Sequence[Line]) -> dict[str, Figure]:
    """File name → plot."""
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


def growth(axis: str, lines: Sequence[Line]) -> Figure:
    """Time over one quantity, a curve per candidate."""
    series: dict[str, list[tuple[float, float]]] = {}
    for line in sorted(lines, key=lambda line: line["shape"]["value"]):
        series.setdefault(line["candidate"], []).append((line["shape"]["value"], line["seconds"]["median"]))
    return curves(f"Time over {axis}", axis, series, duration)
