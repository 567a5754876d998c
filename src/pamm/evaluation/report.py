"""Reports of an evaluation: text for a terminal, and a folder with JSON, Markdown and one page with its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pamm.drawing.colours import colour_meanings
from pamm.drawing.page import REPORT
from pamm.drawing.render import render
from pamm.drawing.table import Row, Table, metric_tables, number, score_table
from pamm.evaluation.evaluate import SCALE, Evaluation
from pamm.evaluation.gain import Comparison
from pamm.evaluation.ranking import Ranking
from pamm.evaluation.scores import Resolution
from pamm.files import replace_text
from pamm.tasks import TASKS, Task

RESULTS, PAGE = "results.json", "results.md"

HEADINGS: Mapping[Resolution, str] = {
    "frame": "In the padded frame, as the papers measure",
    "original": "At the images' own size",
}

SAME = "At the images' own size the numbers are the same: the frame holds every image unchanged."

Named = Sequence[tuple[str, Evaluation]]
"""Results by name: others to compare with first, the evaluation itself last."""

Comparisons = Mapping[Resolution, Comparison]


@dataclass(frozen=True)
class Section:
    """The results at one resolution: their table, what they gain, and the rows that were measured."""

    resolution: Resolution
    protocol: str
    scores: Table
    gain: list[str]
    rows: Sequence[Row]

    @property
    def heading(self) -> str:
        return HEADINGS[self.resolution]


def format_evaluation(named: Named, tasks: Mapping[str, Task], comparisons: Comparisons) -> str:
    """Plain text: the table, the protocol and the gain at every resolution."""
    parts = ["\n".join([str(s.scores), s.protocol, *s.gain]) for s in _sections(named, tasks, comparisons)]
    return "\n\n".join(parts) + (f"\n{SAME}" if _is_same(named[-1][1]) else "")


def write_evaluation_report(
    folder: str | Path,
    named: Named,
    tasks: Mapping[str, Task],
    *,
    comparisons: Comparisons | None = None,
    command: str = "",
) -> Path:
    """Write results.json, results.md and report.html into `folder`; returns the page's path.

    The page is one file without script and without anything from elsewhere: pictures are in it. It holds no date, so that the same
    results give the same bytes. Everything that comes from outside, ids of images above all, is escaped.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name, result = named[-1]
    sections = _sections(named, tasks, comparisons or {})
    content = {
        "title": f"Evaluation of {name}",
        "sections": sections,
        "same": SAME if _is_same(result) else "",
        "facts": {**result.model, **({"command": command} if command else {}), "pamm": version("pamm")},
        "rankings": {task: _shown(ranking, tasks[task]) for task, ranking in result.rankings.items()},
    }
    result.save(folder / RESULTS)
    metrics = {task: _metrics(tasks[task], sections) for task in tasks}
    replace_text(folder / PAGE, render("evaluation.md", **content, metrics=metrics))
    details = [(s.heading, [(task, metric_tables(task, s.rows)) for task in tasks.values()]) for s in sections]
    colours = colour_meanings(tasks)
    replace_text(folder / REPORT, render("evaluation.html", **content, details=details, colours=colours, scale=SCALE))
    return folder / REPORT


def _sections(named: Named, tasks: Mapping[str, Task], comparisons: Comparisons) -> list[Section]:
    """The frame's results, and the images' own where that is another size."""
    last, sections = named[-1][1], []
    for resolution in last.rows:
        if resolution == "original" and _is_same(last):
            continue
        rows = measured = list[Row](((name, result.rows[resolution]) for name, result in named))
        gains, columns, gain = None, {}, []
        if resolution in comparisons:
            found = comparisons[resolution]
            scores = {task: {found.metrics[task]: value} for task, value in found.scores.items()}
            rows = [(found.baseline, scores), *measured]
            gains, columns, gain = [None] * len(measured) + [found.mean], _columns(found, tasks), _gain(found)
        protocol = last.original.protocol if resolution == "original" and last.original else last.protocol
        table = score_table(rows, tasks, gains=gains, columns=columns)
        sections.append(Section(resolution, protocol, table, gain, measured))
    return sections


def _is_same(result: Evaluation) -> bool:
    """Whether both resolutions were measured and are the same one."""
    return bool(result.row and result.original and result.original.resized == 0)


def _columns(found: Comparison, tasks: Mapping[str, Task]) -> dict[str, list[str]]:
    """Task → the metrics its columns show, where a baseline is compared by another one than the task's score."""
    return {t: [tasks[t].score, m] for t, m in found.metrics.items() if t in tasks and m != tasks[t].score}


def _gain(found: Comparison) -> list[str]:
    gains = ", ".join(f"{task} {gain:+.2f}" for task, gain in found.gains.items())
    lines = [f"Δ over {found.baseline}, %: {gains}; mean {found.mean:+.2f} (baseline: {found.source})"]
    others = [f"{task} by {metric}" for task, metric in found.metrics.items() if metric != TASKS[task].score]
    lines += [f"compared by what the baseline's paper measured: {', '.join(others)}"] if others else []
    lines += [f"not measured alike: {text}" for text in found.differences]
    absent = "; ".join(f"{task}: {reason}" for task, reason in found.left_out.items())
    return [*lines, f"not compared: {absent}"] if absent else lines


def _metrics(task: Task, sections: Sequence[Section]) -> Table:
    """Every metric of the evaluation itself, a column per resolution."""
    columns = [s.rows[-1][1].get(task.name, {}) for s in sections]
    keys = dict.fromkeys(key for values in columns for key in values)
    lines = [[task.titled(key), *(number(values.get(key)) for values in columns)] for key in keys]
    return Table([["", *(s.resolution for s in sections)], *lines])


def _shown(ranking: Ranking, task: Task) -> dict[str, Any]:
    """The score that orders the images, with its unit, and both ends: id, score as text, pictures by name."""
    unit = task.units.get(task.quick_score or task.score)
    ends = {
        end: [(one.id, number(one.score), one.pictures) for one in images]
        for end, images in (("worst", ranking.worst), ("best", ranking.best))
    }
    pairs = zip_longest(*([found[:2] for found in images] for images in ends.values()), fillvalue=("", ""))
    table = Table([["worst", "", "best", ""], *([*worst, *best] for worst, best in pairs)], align="<><>")
    return {"by": f"{ranking.score}, {unit}" if unit else ranking.score, "ends": ends, "table": table}
