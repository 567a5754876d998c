"""The multi-task gain Δ, its baselines, and the papers' tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from pamm import PammError
from pamm.config.strict import read_json
from pamm.files import shown


class GainError(PammError, ValueError):
    """A gain that cannot be computed; the message names what is missing and what exists."""


@dataclass(frozen=True)
class Conditions:
    """The conditions of a measurement that decide whether its scores are comparable with others."""

    data: str
    """Kind of data set, as `data.name` of an experiment."""
    split: str | Mapping[str, str]
    """Name of the split, or task → its name."""
    boundaries: str = "bdet"
    """Protocol of the boundary benchmark."""

    def split_of(self, task: str) -> str:
        """The split on which the task was measured."""
        return self.split if isinstance(self.split, str) else self.split[task]


@dataclass(frozen=True)
class PublishedEvaluation:
    """The measuring conditions of a line of papers."""

    metrics: Mapping[str, str]
    """Task → the metric of this package that is the same as theirs."""
    boundaries: str
    """Protocol of the boundary benchmark."""
    split: str
    boundary_splits: Mapping[str, str]
    """Data set → the split on which boundaries are measured, where it is another one."""

    def differences(self, dataset: str, tasks: Iterable[str], own: Conditions) -> list[str]:
        """In what `own` differs from how these papers measured `tasks` on `dataset`, in words; empty where it does not."""
        if own.data != dataset:
            return [f"measured on the data set '{own.data}', printed of '{dataset}'"]
        found: dict[str, list[str]] = {}
        for task in tasks:
            theirs = self.boundary_splits.get(dataset, self.split) if task == "edge" else self.split
            if own.split_of(task) != theirs:
                found.setdefault(f"measured on the split '{own.split_of(task)}', printed of '{theirs}'", []).append(
                    task
                )
        said = [f"{', '.join(names)}: {text}" for text, names in found.items()]
        if "edge" in tasks and own.boundaries != self.boundaries:
            said.append(f"edge: measured by the protocol '{own.boundaries}', printed by '{self.boundaries}'")
        return said


@dataclass(frozen=True)
class PaperRow:
    """One row of a published table."""

    method: str
    """The row's label in the table."""
    scores: Mapping[str, float]
    """Task → its score: mIoU, maxF and odsF in percent, RMSE in metres, mErr in degrees; tasks not reported are absent.
    The table's `evaluation` says how they are computed."""
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
    evaluation: str = "invpt"
    """Name among `evaluations()` of how the scores were measured."""


@dataclass(frozen=True)
class Baseline:
    """Named scores that a multi-task model is compared with."""

    source: str
    dataset: str
    scores: Mapping[str, float]
    """Task → score, in the units of `PaperRow.scores`."""
    evaluation: str = "invpt"
    """Name among `evaluations()` of how the scores were measured."""


def multi_task_gain(
    row: Mapping[str, float], baseline: Mapping[str, float], higher_is_better: Mapping[str, bool] | None = None
) -> float:
    """Average relative gain Δ over a baseline, percent (Maninis et al. 2019; Vandenhende et al. 2021).

    Δ = 100/T · Σ_t s_t (row_t − baseline_t) / baseline_t over the T tasks of `row`; s_t is 1 if higher is better and −1 if lower
    is better.

    Args:
        row: task → score.
        baseline: task → score; tasks that only the baseline has are left out.
        higher_is_better: task → bool; by default from the registered tasks.

    Returns:
        Δ in percent.

    Raises:
        GainError: the row is empty, a task has no baseline or no direction, or a baseline is 0.
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
def evaluations() -> dict[str, PublishedEvaluation]:
    """Name → how a line of papers measured."""
    return {name: PublishedEvaluation(**values) for name, values in _data()["evaluations"].items()}


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
                named[entry["baseline"]] = Baseline(source, table.dataset, row.scores, table.evaluation)
    return named


@dataclass(frozen=True)
class Comparison:
    """An evaluation beside a baseline."""

    baseline: str
    source: str
    """The data of the baseline's scores, or their source, in words."""
    scores: Mapping[str, float]
    """Task → the baseline's score, of the tasks that are compared."""
    gains: Mapping[str, float]
    """Task → relative gain, percent, above 0 where the evaluation is better."""
    left_out: Mapping[str, str]
    """Task → why it is not compared."""
    metrics: Mapping[str, str]
    """Task → the metric compared."""
    differences: Sequence[str] = ()
    """Differences between the measuring conditions of the two, in words."""

    @property
    def mean(self) -> float:
        """The multi-task gain Δ, percent."""
        return sum(self.gains.values()) / len(self.gains)

    def summary(self) -> dict[str, Any]:
        """As JSON values, to 6 significant digits."""
        gains = {task: float(f"{value:.6g}") for task, value in self.gains.items()}
        content = {"percent": float(f"{self.mean:.6g}"), "tasks": gains, "metrics": dict(self.metrics)}
        return content | {"left_out": dict(self.left_out), "measured_differently": list(self.differences)}


def compare(
    row: Mapping[str, Mapping[str, float]],
    baseline: str,
    resolution: str = "frame",
    *,
    own: Conditions | None = None,
    protocol: str | None = None,
) -> Comparison:
    """Compare an evaluation with a baseline: Δ of each task, and their mean.

    Tasks that only one side has are named and left out. If the baseline is a paper's, the metrics that the paper measured are
    compared (`PublishedEvaluation.metrics`).

    Args:
        row: task → metric → value.
        baseline: a name of `baselines()`, or a JSON file of results of `pamm eval` or `pamm train`.
        resolution: "frame" or "original"; the results of a file at this resolution are used.
        own: conditions under which the row was measured; with it, the comparison lists the differences from the baseline's.
        protocol: the row's protocol, in the words of a results file.

    Returns:
        The comparison.

    Raises:
        GainError: the baseline does not exist (the message lists the known ones), or no task can be compared.
    """
    references, metrics = baseline_scores(baseline), metrics_over(baseline)
    if resolution not in references:
        raise GainError(
            f"{baseline} has no results at the resolution '{resolution}', only: {', '.join(references)}. Measure it again "
            "with pamm eval --resolution both --out"
        )
    source, reference = references[resolution]
    scores = {task: values.get(metrics[task]) for task, values in row.items()}
    left_out = {}
    for task in dict.fromkeys([*scores, *reference]):
        reason = _why_not(metrics[task], scores.get(task), reference.get(task))
        left_out |= {task: reason} if reason else {}
    measured = {task: value for task, value in scores.items() if value is not None and task not in left_out}
    known = {task: value for task in measured if (value := reference[task]) is not None}
    if not known:
        raise GainError(
            f"nothing to compare with the baseline '{baseline}': "
            + "; ".join(f"{task}: {reason}" for task, reason in left_out.items())
            + ". Choose a baseline of the same tasks"
        )
    gains = {task: multi_task_gain({task: measured[task]}, known) for task in known}
    used = {task: metrics[task] for task in known}
    differences = _differences(baseline, source, known, own, protocol)
    return Comparison(baseline, source, known, gains, left_out, used, differences)


def metrics_over(baseline: str) -> dict[str, str]:
    """Task → the metric that is compared over this baseline: the task's score, or what a paper printed in its place."""
    from pamm.tasks import TASKS

    own = {name: task.score for name, task in TASKS.items()}
    return own | dict(evaluations()[baselines()[baseline].evaluation].metrics) if baseline in baselines() else own


def _differences(
    baseline: str, source: str, tasks: Iterable[str], own: Conditions | None, protocol: str | None
) -> list[str]:
    """Known differences between the measuring conditions of an evaluation and a baseline."""
    if baseline in baselines():
        known = baselines()[baseline]
        return evaluations()[known.evaluation].differences(known.dataset, tasks, own) if own else []
    if protocol is not None and protocol != source:
        return [f"measured on: {protocol}; the baseline on: {source}"]
    return []


def _why_not(score: str, own: float | None, other: float | None) -> str:
    """The reason why two scores of a task cannot be compared; empty if they can."""
    if own is None or not math.isfinite(own):
        return f"no {score} was measured"
    if other is None:
        return f"the baseline has no {score}"
    return "" if other else "the baseline's score is 0"


def baseline_scores(baseline: str) -> dict[str, tuple[str, dict[str, float | None]]]:
    """Resolution → where the scores are from, in words, and task → score. What a paper prints stands for both resolutions.

    Raises GainError where `baseline` is neither a name of `baselines()` nor a JSON file of results.
    """
    from pamm.tasks import TASKS

    if baseline in baselines():
        known = baselines()[baseline]
        return dict.fromkeys(("frame", "original"), (f"{known.source}; {known.dataset}", dict(known.scores)))
    if not Path(baseline).is_file():
        raise GainError(f"no baseline '{baseline}' and no results file; known baselines: {', '.join(baselines())}")
    try:
        content = read_json(Path(baseline), finite=False)
        parts = {"frame": content, "original": content.get("original", {})}
        found = {
            name: (
                str(part.get("protocol", "protocol not stated")),
                {t: _score(v.get(TASKS[t].score)) for t, v in results.items()},
            )
            for name, part in parts.items()
            if (results := part.get("results"))
        }
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise GainError(f"{baseline} is not a results file of `pamm eval --out` ({shown(repr(error), 200)})") from error
    if not found:
        raise GainError(f"{baseline} is not a results file of `pamm eval --out`: it has no results")
    return found


def _score(value: Any) -> float | None:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise TypeError(f"a score is {shown(repr(value))}, expected a number")


@cache
def _data() -> dict[str, Any]:
    return yaml.safe_load(files("pamm.evaluation").joinpath("papers.yaml").read_text(encoding="utf-8"))


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
        evaluation=values.get("evaluation", "invpt"),
    )


def _row(tasks: tuple[str, ...], entry: Mapping[str, Any]) -> PaperRow:
    scores = {task: value for task, value in zip(tasks, entry["scores"], strict=True) if value is not None}
    known = ("method", "scores", "gain", "recomputed", "baseline")
    details = {key: value for key, value in entry.items() if key not in known}
    return PaperRow(entry["method"], scores, details, entry.get("gain"), entry.get("recomputed"))
