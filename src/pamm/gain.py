"""The multi-task gain Δ, the baselines it is measured against, and the published tables it is known from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml


class GainError(ValueError):
    """A gain that cannot be computed; the message tells what is absent and what there is."""


@dataclass(frozen=True)
class PaperRow:
    """One row of a published table."""

    method: str
    """What the row is, as the table names it."""
    scores: Mapping[str, float]
    """Task → its score: mIoU, maxF and odsF in percent, RMSE in metres, mErr in degrees; tasks not reported are absent."""
    details: Mapping[str, Any]
    """The row's other columns and, under `note`, what a reader must know; `parameters` in millions, `flops` in 10⁹."""
    gain: float | None = None
    """Δ as printed, percent."""
    recomputed: float | None = None
    """Δ from this row's scores and the table's baseline, percent, where it disagrees with the printed one."""


@dataclass(frozen=True)
class PaperTable:
    """One published table on one data set."""

    paper: str
    number: str
    dataset: str
    tasks: tuple[str, ...]
    rows: tuple[PaperRow, ...]
    baseline: str | None
    """Name, among `baselines()`, of what the printed Δ compare with; None where the table prints no Δ."""
    note: str = ""


@dataclass(frozen=True)
class Baseline:
    """Named scores that a multi-task model is compared with."""

    source: str
    dataset: str
    scores: Mapping[str, float]
    """Task → score, in the units of `PaperRow.scores`."""


def multi_task_gain(
    row: Mapping[str, float], baseline: Mapping[str, float], higher_is_better: Mapping[str, bool] | None = None
) -> float:
    """Average relative gain Δ of `row` over `baseline`, percent (Maninis et al. 2019; Vandenhende et al. 2021).

    Δ = 100/T · Σ_t s_t (row_t − baseline_t) / baseline_t over the T tasks of `row`, s_t = 1 where higher is better and −1
    where lower is. Tasks that only the baseline has are left out. `higher_is_better`: task → bool, by default what the
    registered tasks say. Raises GainError for an empty row, a task without baseline or direction, and a baseline of 0.
    """
    if higher_is_better is None:
        from pamm.tasks import TASKS

        higher_is_better = {name: task.higher_is_better for name, task in TASKS.items()}
    if not row:
        raise GainError("the gain needs the score of at least one task; the row has none")
    for known, what in ((baseline, "score in the baseline"), (higher_is_better, "direction in higher_is_better")):
        absent = [task for task in row if task not in known]
        if absent:
            raise GainError(
                f"no {what} for {', '.join(absent)}, only for {', '.join(known)}; add it or leave the task out"
            )
    zero = [task for task in row if baseline[task] == 0]
    if zero:
        raise GainError(
            f"the baseline's score is 0 for {', '.join(zero)}, so no relative gain exists; leave the task out"
        )
    gains = [(1 if higher_is_better[t] else -1) * (row[t] - baseline[t]) / baseline[t] for t in row]
    return 100 * sum(gains) / len(gains)


@cache
def paper_tables() -> tuple[PaperTable, ...]:
    """The tables of the PAMM and MTMamba papers, every row."""
    return tuple(_table(values) for values in _data()["tables"])


@cache
def baselines() -> dict[str, Baseline]:
    """Name → baseline: the single-task sets in circulation and the baseline row of every table that prints Δ."""
    named = {name: Baseline(**values) for name, values in _data()["baselines"].items()}
    for values in _data()["tables"]:
        table = _table(values)
        for row, entry in zip(table.rows, values["rows"], strict=True):
            if "baseline" in entry:
                source = f"{table.paper} paper, Table {table.number}, row '{row.method}'"
                named[entry["baseline"]] = Baseline(source, table.dataset, row.scores)
    return named


def measured_gain(row: Mapping[str, Mapping[str, float]], baseline: str) -> tuple[float, tuple[str, ...]]:
    """Δ of an evaluation's row over a baseline, percent, and the tasks it covers.

    row: task → metric → value. baseline: a name of `baselines()`, or a JSON file of results that `pamm eval --out` wrote.
    Compared are the tasks whose reported score both have.
    Raises GainError, naming the baselines, where there is none of that name or nothing to compare.
    """
    from pamm.tasks import TASKS

    scores = {task: values.get(TASKS[task].score, math.nan) for task, values in row.items()}
    if baseline in baselines():
        metrics = _data()["metrics"]
        reference = {t: s for t, s in baselines()[baseline].scores.items() if metrics[t] == TASKS[t].score}
    elif Path(baseline).is_file():
        reference = _results(Path(baseline))
    else:
        raise GainError(f"no baseline '{baseline}' and no results file; known baselines: {', '.join(baselines())}")
    common = [t for t in scores if reference.get(t) and math.isfinite(scores[t])]
    if not common:
        raise GainError(f"the baseline '{baseline}' has no score of {', '.join(scores)}; choose one of the same tasks")
    return multi_task_gain({t: scores[t] for t in common}, reference), tuple(common)


def _results(path: Path) -> dict[str, float | None]:
    """Task → score of a results file."""
    from pamm.tasks import TASKS

    try:
        results = json.loads(path.read_text())["results"]
        return {task: values.get(TASKS[task].score) for task, values in results.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise GainError(f"{path} is not a results file of `pamm eval --out` ({error!r})") from error


@cache
def _data() -> dict[str, Any]:
    return yaml.safe_load(files("pamm").joinpath("papers.yaml").read_text(encoding="utf-8"))


def _table(values: Mapping[str, Any]) -> PaperTable:
    tasks = tuple(values["tasks"])
    return PaperTable(
        paper=values["paper"],
        number=values["number"],
        dataset=values["dataset"],
        tasks=tasks,
        rows=tuple(_row(tasks, entry) for entry in values["rows"]),
        baseline=values.get("baseline"),
        note=values.get("note", ""),
    )


def _row(tasks: tuple[str, ...], entry: Mapping[str, Any]) -> PaperRow:
    scores = {task: value for task, value in zip(tasks, entry["scores"], strict=True) if value is not None}
    known = ("method", "scores", "gain", "recomputed", "baseline")
    details = {key: value for key, value in entry.items() if key not in known}
    return PaperRow(entry["method"], scores, details, entry.get("gain"), entry.get("recomputed"))
