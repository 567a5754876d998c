"""Tables of results: one content, written as plain text, as Markdown or as HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pamm.drawing.render import markdown_text, render

if TYPE_CHECKING:
    from pamm.tasks import Task

Row = tuple[str, Mapping[str, Mapping[str, float | None]]]
"""Name of a result, and task → metric → value; None, absent, NaN and infinite values are shown as a dash."""

Cells = tuple[list[str], frozenset[int]]
"""Texts of a column, and the places of the best ones."""

MISSING = "–"


@dataclass(frozen=True)
class Table:
    """Lines of cells, the first of them the header.

    Args:
        lines: texts, which may come from outside: every written form escapes them.
        best: (line, column) of the cells in bold, where the form has a bold face.
        align: "<" or ">" per column, to the left or right; the last holds for all further columns.
    """

    lines: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    align: str = "<>"

    def sides(self) -> str:
        """The letter of every column."""
        return self.align.ljust(len(self.lines[0]), self.align[-1])

    def __str__(self) -> str:
        """Plain text in columns, with a rule below the header."""
        widths = [max(map(len, column)) for column in zip(*self.lines, strict=True)]
        lines = [*self.lines[:1], ["-" * width for width in widths], *self.lines[1:]]
        forms = [f"{side}{width}" for side, width in zip(self.sides(), widths, strict=True)]
        return "\n".join("  ".join(map(format, line, forms)).rstrip() for line in lines)

    def markdown(self) -> str:
        """A Markdown table, without a newline at its end."""
        lines = [
            [f"**{text}**" if (i, j) in self.best else text for j, text in enumerate(map(markdown_text, line))]
            for i, line in enumerate(self.lines)
        ]
        lines.insert(1, [{"<": "---", ">": "---:"}[side] for side in self.sides()])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def __html__(self) -> str:
        return render("table.html", table=self)


def score_table(
    rows: Sequence[Row],
    tasks: Mapping[str, Task],
    *,
    gains: Sequence[float | None] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
) -> Table:
    """One row per result, one column per task's score, ↑ where higher is better and ↓ where lower; the best of several is bold.

    Args:
        gains: the multi-task gain Δ of each row, percent, as a last column.
        columns: task → the metrics of its columns, if they are not only its score.
    """
    header, found = [""], [([name for name, _ in rows], frozenset[int]())]
    for name, task in tasks.items():
        for metric in (columns or {}).get(name, [task.score]):
            header.append(score_title(task, metric))
            found.append(_column([row.get(name, {}).get(metric) for _, row in rows], task.higher_is_better))
    if gains is not None:
        if len(gains) != len(rows):
            raise ValueError(f"{len(gains)} gains for {len(rows)} rows; give one per row, None where there is none")
        header.append("Δ % ↑")
        found.append(([number(gain, 2, sign="+") for gain in gains], frozenset()))
    return _from_columns(header, found)


def score_title(task: Task, metric: str) -> str:
    """A column's heading: task, metric with its unit, and which way is better."""
    return f"{task.name} {task.titled(metric)} {'↑' if task.higher_is_better else '↓'}"


def metric_tables(task: Task, rows: Sequence[Row]) -> dict[str, Table]:
    """Every metric of a task: "" → the table of those of the whole, `kind` → the table of those named "kind/class"."""
    groups: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for _, row in rows for key in row.get(task.name, {})):
        groups.setdefault(key.partition("/")[0] if "/" in key else "", []).append(key)
    tables = {}
    for kind, keys in groups.items():
        lines, best = [[task.titled(kind) if kind else "", *(run for run, _ in rows)]], set()
        for i, key in enumerate(keys, start=1):
            better = task.higher_is_better if kind or key == task.score else None
            texts, marked = _column([row.get(task.name, {}).get(key) for _, row in rows], better)
            lines.append([key.partition("/")[2] if kind else task.titled(key), *texts])
            best |= {(i, j + 1) for j in marked}
        tables[kind] = Table(lines, frozenset(best))
    return tables


def _from_columns(header: Sequence[str], columns: Sequence[Cells]) -> Table:
    lines = [header, *zip(*(texts for texts, _ in columns), strict=True)]
    return Table(lines, frozenset((i + 1, j) for j, (_, best) in enumerate(columns) for i in best))


def _column(values: Sequence[float | None], higher_is_better: bool | None) -> Cells:
    """Numbers of one column with one number of decimals, that of the best; `higher_is_better` None: no best, the largest's."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    best = (min if higher_is_better is False else max)(known, default=0.0)
    digits = decimals(best)
    marked = higher_is_better is not None and len(set(known)) > 1
    texts = [number(value, digits) for value in values]
    return texts, frozenset(i for i, value in enumerate(values) if marked and value == best)


def number(value: float | None, digits: int | None = None, *, sign: str = "") -> str:
    """A number with so many decimals, by default those of four significant digits; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:{sign}.{decimals(value) if digits is None else digits}f}"


def decimals(value: float) -> int:
    """Decimals that show four significant digits, from 2 to 4."""
    return 4 if abs(value) < 1 else max(2, 3 - math.floor(math.log10(abs(value))))
