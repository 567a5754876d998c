"""The table that finished runs give: means and spreads over seeds, Δ paired by seed, and its two written forms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pamm.ablate.cost import Cost
from pamm.ablate.runs import OWN_SPLIT, Plan, Run
from pamm.ablate.splits import results_on
from pamm.ablate.tables import AblationTable
from pamm.build import label_options
from pamm.config.strict import load_json
from pamm.drawing.render import render
from pamm.drawing.table import MISSING, Table, decimals, number, score_title
from pamm.evaluation.gain import Conditions, GainError, PaperTable, evaluations, multi_task_gain, paper_tables
from pamm.tasks import TASKS, Task, create_task


@dataclass
class RowResult:
    """A row of the table."""

    label: str
    recipe: str
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    """Seed → task → score, of the seeds whose runs are finished; a score that is not finite is left out."""
    gains: dict[int, float] = field(default_factory=dict)
    """Seed → Δ over the baseline row of the same seed, percent."""
    cost: Cost | None = None

    def of(self, task: str) -> list[float]:
        """The task's scores, seed by seed."""
        return [scores[task] for scores in self.scores.values() if task in scores]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n − 1); None for the latter of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def score_names(table: AblationTable, tasks: Sequence[str]) -> dict[str, str]:
    """Task → the metric that its column shows: what the paper of the table measured, else the task's score.

    A curve has the stand-ins of metrics that take long.
    """
    printed = printed_table(table)
    metrics = evaluations()[printed.evaluation].metrics if printed else {}
    own = {task: metrics.get(task, TASKS[task].score) for task in tasks}
    return {task: (table.curve and TASKS[task].quick_score) or own[task] for task in tasks}


def collect(plan: Plan) -> list[RowResult]:
    """One result per row of the plan, with what is finished; of a curve, one per evaluation."""
    if plan.table.curve:
        return _curve(plan)
    results = []
    for row in plan.rows:
        result = RowResult(row.label, next((run.recipe for run in plan.runs if run.label == row.label), ""))
        for seed in plan.seeds:
            scores = _scores(plan, plan.of(row.label, seed))
            if scores:
                result.scores[seed] = scores
        results.append(result)
    add_gains(results, plan.table.baseline)
    return results


def _scores(plan: Plan, runs: Sequence[Run]) -> dict[str, float]:
    """Task → score of the runs of one row and seed; empty where one of them is not finished or not measured."""
    found = [results for run in runs if (results := results_on(run, plan.splits)) is not None]
    if not found or len(found) < len(runs):
        return {}
    rows = {task: metrics for results, _ in found for task, metrics in results.items()}
    values = {task: rows[task].get(name) for task, name in score_names(plan.table, list(rows)).items()}
    return {task: value for task, value in values.items() if value is not None and math.isfinite(value)}


def _curve(plan: Plan) -> list[RowResult]:
    """One result per evaluated step, from the logs, also of runs that are under way."""
    points: dict[int, RowResult] = {}
    for run in plan.runs:
        log = run.folder / "log.jsonl"
        if run.state() not in ("finished", "begun") or not log.exists():
            continue
        names = score_names(plan.table, list(run.experiment.tasks))
        for line in map(_record, log.read_text(encoding="utf-8", errors="replace").splitlines()):
            if line.get("kind") == "val":
                point = points.setdefault(line["step"], RowResult(f"step {line['step']}", run.recipe))
                keys = {task: f"{task}/{name}" for task, name in names.items()}
                point.scores[run.seed] = {task: line[key] for task, key in keys.items() if key in line}
    return [points[step] for step in sorted(points)]


def _record(line: str) -> dict:
    """A line of a log; nothing of one that a kill or a full disk cut off."""
    try:
        content = load_json(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) and type(content.get("step")) is int else {}


def add_gains(results: Sequence[RowResult], baseline: str | None) -> None:
    """Give every row its Δ over the baseline row, at every seed where both have the same tasks."""
    reference = next((result for result in results if result.label == baseline), None)
    if reference is None:
        return
    for result in results:
        for seed in result.scores.keys() & reference.scores.keys():
            row, base = result.scores[seed], reference.scores[seed]
            if row.keys() != base.keys():  # Δ of fewer tasks would be another figure
                continue
            try:
                result.gains[seed] = multi_task_gain(row, base)
            except GainError:  # a baseline of 0
                continue
        result.gains = dict(sorted(result.gains.items()))


# -- written forms -------------------------------------------------------------------------------------------------------


def measured_tasks(plan: Plan, tasks: Sequence[str]) -> dict[str, Task]:
    """The tasks as the runs' data describe them, on which the unit of depth depends; by default where the data are not there."""
    try:
        described = label_options(plan.runs[0].experiment) if plan.runs else {}
    except ValueError:
        described = {}
    return {name: create_task(name, **described.get(name, {})) for name in tasks}


def result_table(table: AblationTable, results: Sequence[RowResult], tasks: Mapping[str, Task]) -> Table:
    """A row per result: tasks, Δ, parameters and arithmetic where the table has them, seeds."""
    names = score_names(table, list(tasks))
    header = [""] + [score_title(task, names[name]) for name, task in tasks.items()]
    columns = [[result.label for result in results], *(_column([r.of(task) for r in results], task) for task in tasks)]
    if table.baseline:
        header.append("Δ % ↑")
        columns.append([_shown(list(result.gains.values()), 2, sign="+") for result in results])
    if table.cost:
        header += ["parameters, M", "10⁹ multiply-adds"]
        columns.append([number(r.cost and r.cost.parameters / 1e6, 2) for r in results])
        columns.append([number(r.cost and r.cost.multiply_adds / 1e9, 2) for r in results])
    header.append("seeds")
    columns.append([str(len(result.scores)) for result in results])
    return Table([header, *zip(*columns, strict=True)])


def _column(values: Sequence[Sequence[float]], task: str) -> list[str]:
    means = [statistics.fmean(row) for row in values if row]
    digits = decimals((max if TASKS[task].higher_is_better else min)(means, default=0.0))
    return [_shown(row, digits) for row in values]


def _shown(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± sample standard deviation; only the mean for a single value, a dash for none."""
    if not values:
        return MISSING
    mean, spread = mean_and_spread(values)
    return f"{mean:{sign}.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def printed_table(table: AblationTable) -> PaperTable | None:
    """The paper's own table."""
    found = (t for t in paper_tables() if (t.paper, t.number) == table.paper)
    return next((t for t in found if table.dataset in (None, t.dataset)), None)


def paper_figures(table: AblationTable, printed: PaperTable) -> Table:
    """The paper's figures of the table's rows, or of all methods, in the form of `result_table`."""
    names = score_names(table, printed.tasks)
    header = [""] + [score_title(create_task(name), names[name]) for name in printed.tasks]
    extra = ["parameters", "flops"] if table.cost else []
    header += (["Δ % ↑"] if table.baseline else []) + (["parameters, M", "10⁹ FLOP"] if extra else [])
    lines = [header]
    own = {row.printed: row.label for row in table.rows if row.printed is not None}
    for place in range(len(printed.rows)) if table.others else own:
        found = printed.rows[place]
        label = own.get(place) or ", ".join([found.method, *map(str, found.details.values())])
        scores = [number(found.scores.get(task)) for task in printed.tasks]
        gain = [number(found.gain, 2, sign="+")] if table.baseline else []
        lines.append([label, *scores, *gain, *(number(found.details[key], 2) for key in extra)])
    return Table(lines)


def notes(plan: Plan, results: Sequence[RowResult], protocol: str) -> list[str]:
    """Notes for the readers of the table."""
    said = [protocol] if protocol else []
    if any(len(result.scores) > 1 for result in results):
        said.append("± is the sample standard deviation over seeds.")
    if plan.table.baseline:
        said.append(f"Δ is the mean relative gain over '{plan.table.baseline}', each seed against the same seed.")
    if plan.table.curve and any(TASKS[t].quick_score for run in plan.runs for t in run.experiment.tasks):
        said.append("During training a quick stand-in replaces odsF.")
    return said + printed_notes(plan)


def printed_notes(plan: Plan) -> list[str]:
    """Differences between the measuring conditions of the table's figures and of the printed ones."""
    printed = printed_table(plan.table)
    if not printed or not plan.runs:
        return []
    experiment = plan.runs[0].experiment
    tasks = [task for task in printed.tasks if any(task in run.experiment.tasks for run in plan.runs)]
    edge = next((run.experiment.tasks["edge"] for run in plan.runs if "edge" in run.experiment.tasks), None)
    splits = {task: plan.splits.get(task, OWN_SPLIT) for task in tasks}
    own = Conditions(experiment.data.name, splits, str(edge.options.get("protocol", "bdet")) if edge else "bdet")
    evaluation = evaluations()[printed.evaluation]
    said = [
        f"{task}: {name} is what the paper prints as {TASKS[task].score} ({TASKS[task].score}, without its second sigmoid, "
        "stands in each run's results.json)"
        for task, name in score_names(plan.table, tasks).items()
        if name != TASKS[task].score
    ]
    said += [f"Not measured alike: {text}." for text in evaluation.differences(printed.dataset, tasks, own)]
    if own.data == printed.dataset and "edge" in tasks:
        split = evaluation.boundary_splits.get(printed.dataset)
        said += [f"--split edge={split} measures boundaries as printed."] if split not in (None, splits["edge"]) else []
    return said


def written(plan: Plan, results: Sequence[RowResult], tasks: Sequence[str], protocol: str) -> tuple[str, str]:
    """The table with the paper's beneath it: as text for a terminal, and as a Markdown page."""
    table = result_table(plan.table, results, measured_tasks(plan, tasks))
    said, printed = notes(plan, results, protocol), printed_table(plan.table)
    parts, figures = [plan.table.title, table, *said], None
    if printed:
        figures = paper_figures(plan.table, printed)
        parts.append(f"\nprinted in the {printed.paper} paper, Table {printed.number} ({printed.dataset}):")
        parts += [figures, *filter(None, [printed.note])]
    page = render("ablation.md", title=plan.table.title, table=table, notes=said, printed=printed, figures=figures)
    return "\n".join(map(str, parts)), page


def as_json(plan: Plan, results: Sequence[RowResult], protocol: str, failed: Mapping[str, str]) -> dict[str, Any]:
    """Every figure of the table, seed by seed and in sum."""
    rows = []
    for result in results:
        tasks = dict.fromkeys(task for scores in result.scores.values() for task in scores)
        sums = {task: mean_and_spread(result.of(task)) for task in tasks}
        rows.append(
            {
                "label": result.label,
                "recipe": result.recipe,
                "scores": result.scores,
                "mean": {task: mean for task, (mean, _) in sums.items()},
                "spread": {task: spread for task, (_, spread) in sums.items()},
                "gains": result.gains,
                "gain": dict(zip(("mean", "spread"), mean_and_spread(list(result.gains.values())), strict=True))
                if result.gains
                else None,
                "cost": result.cost._asdict() if result.cost else None,
            }
        )
    return {
        "table": plan.table.name,
        "title": plan.table.title,
        "baseline": plan.table.baseline,
        "metrics": score_names(plan.table, list(dict.fromkeys(t for run in plan.runs for t in run.experiment.tasks))),
        "protocol": protocol,
        "splits": dict(plan.splits),
        "measured_differently": printed_notes(plan),
        "seeds": list(plan.seeds),
        "rows": rows,
        "failed": dict(failed),
    }
