"""The training runs behind a table: which there are, how far each is, and training those that are not finished."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pamm.ablate.tables import AblationRow, AblationTable
from pamm.config.experiment import Experiment, load
from pamm.config.strict import ConfigError, read_json
from pamm.evaluation.gain import GainError
from pamm.files import shown
from pamm.training.run import differences, train

EVALUATIONS = 8
"""Points of a curve, where the recipe evaluates only at the end."""

FINISHED, BEGUN, ABSENT = "finished", "begun", "not begun"

OWN_SPLIT = "val"
"""The split that training evaluates on."""


@dataclass(frozen=True)
class Run:
    """One training of one row."""

    label: str
    recipe: str
    seed: int
    experiment: Experiment
    folder: Path

    def state(self) -> str:
        """FINISHED, BEGUN or ABSENT, or another content of the folder in words."""
        written = self.folder / "experiment.yaml"
        if not written.exists():
            return ABSENT
        try:
            other = differences(written, self.experiment) + _other_scores(load(written), self.experiment)
        except ConfigError as error:
            return f"cannot be read: {error}"
        if other:
            return f"holds another experiment ({'; '.join(other[:4])})"
        return FINISHED if (self.folder / "results.json").exists() else BEGUN

    def content(self) -> dict[str, Any] | None:
        """Content of results.json of a finished run, else None. Raises GainError for a file that is not one of results."""
        if self.state() != FINISHED:
            return None
        path = self.folder / "results.json"
        try:
            content = read_json(path, finite=False)
            results = {task: dict(scores) for task, scores in content["results"].items()}
            found = {"results": results, "model": dict(content.get("model") or {})}
            return found | {"protocol": str(content.get("protocol", ""))}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise GainError(
                f"{path} is not a results file ({shown(repr(error), 200)}). Remove it: the run is then evaluated again"
            ) from None


def _other_scores(finished: Experiment, wanted: Experiment) -> list[str]:
    """Differences that a run may go on with, but not share a table's figures."""
    found = []
    if finished.train.eval_every != wanted.train.eval_every:  # the best of other evaluations is another network
        found.append(f"train.eval_every: {finished.train.eval_every} there, {wanted.train.eval_every} here")
    if wanted.data.name == "folder" and finished.data.root != wanted.data.root:
        found.append(f"data.root: {finished.data.root} there, {wanted.data.root} here")
    return found


@dataclass(frozen=True)
class Plan:
    """The runs of a table's rows, and the rows that cannot be."""

    table: AblationTable
    rows: tuple[AblationRow, ...]
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    """All rows of the first seed, then all of the second, so that a table is whole, with fewer seeds, early."""
    failed: dict[str, str]
    """Label → why the row cannot be."""
    splits: Mapping[str, str] = field(default_factory=dict)
    """Task → the split it is measured on; tasks that are absent are measured where training evaluates."""

    def of(self, label: str, seed: int) -> list[Run]:
        """The runs of a row and a seed; several where it has one per task."""
        return [run for run in self.runs if (run.label, run.seed) == (label, seed)]

    def pending(self) -> list[Run]:
        """The runs that are not finished, in order. A recipe that two rows share is trained once."""
        return list({run.folder: run for run in self.runs if run.state() != FINISHED}.values())


def make_plan(
    table: AblationTable,
    rows: Sequence[AblationRow],
    *,
    base: str,
    seeds: Sequence[int],
    out: Path,
    resolve: Callable[[str], Experiment],
    split: str | None = None,
) -> Plan:
    """Plan the runs of a table's rows.

    Run folders are <out>/<recipe>/seed-<n>; those of a curve are <out>/<table>/<recipe>/seed-<n>. `Plan.failed` lists the rows
    that cannot be derived from `base`.

    Args:
        table: the table.
        rows: the rows to train.
        base: recipe or file from which the rows are derived.
        seeds: one run of each row per seed.
        out: folder of all runs.
        resolve: a recipe's full name → its experiment.
        split: splits to measure on, as on the command line; see `parse_splits`.

    Returns:
        The plan.

    Raises:
        ConfigError: `split` is not valid.
    """
    experiments, failed = {}, {}
    for row in rows:
        try:
            experiments[row] = resolve(row.recipe_on(base))
        except ConfigError as error:
            failed[row.label] = str(error)
    runs = []
    for seed in seeds:
        for row, experiment in experiments.items():
            runs += _runs(table, row, row.recipe_on(base), _seeded(table, experiment, seed), out)
    tasks = list(dict.fromkeys(task for run in runs for task in run.experiment.tasks))
    splits = parse_splits(split, tasks) if split and runs else {}
    return Plan(table, tuple(rows), tuple(seeds), tuple(runs), failed, splits)


def parse_splits(text: str, tasks: list[str]) -> dict[str, str]:
    """`NAME` for all tasks or `TASK=NAME,TASK=NAME` → task → split. Raises ConfigError."""
    found: dict[str, str] = {}
    for part in text.split(","):
        task, given, split = part.strip().rpartition("=")
        if not re.fullmatch(r"\w[\w.-]*", split) or bool(given) != bool(task):
            raise ConfigError(f"--split: found '{part}', expected a split's name or TASK=NAME, as in edge=test_new")
        if task and task not in tasks:
            raise ConfigError(f"--split: '{task}' is none of the tasks here: {', '.join(tasks)}")
        found |= dict.fromkeys([task] if task else tasks, split)
    return {task: split for task, split in found.items() if split != OWN_SPLIT}


def _seeded(table: AblationTable, experiment: Experiment, seed: int) -> Experiment:
    settings = replace(experiment.train, seed=seed)
    if table.curve and not settings.eval_every:
        settings = replace(settings, eval_every=max(1, settings.steps // EVALUATIONS))
    return replace(experiment, train=settings)


def _runs(table: AblationTable, row: AblationRow, recipe: str, experiment: Experiment, out: Path) -> list[Run]:
    folder = (out / table.name if table.curve else out) / Path(recipe).name / f"seed-{experiment.train.seed}"
    if not row.per_task:
        return [Run(row.label, recipe, experiment.train.seed, experiment, folder)]
    return [
        Run(row.label, recipe, experiment.train.seed, replace(experiment, tasks={task: config}), folder / task)
        for task, config in experiment.tasks.items()
    ]


def train_all(plan: Plan, *, progress: bool, say: Callable[[str], None]) -> dict[str, str]:
    """Train the runs that are not finished. An error in one run does not end the others.

    Args:
        plan: the runs.
        progress: show bars on the standard error.
        say: called with each message.

    Returns:
        Label of a row → the reason of its failure.
    """
    failed = dict(plan.failed)
    pending = plan.pending()
    say(f"{plan.table.name}: {len(pending)} of {len(plan.runs)} runs to train")
    for number, run in enumerate(pending, start=1):
        say(f"[{number}/{len(pending)}] {run.label}, seed {run.seed}: {run.folder}")
        try:
            train(run.experiment, run.folder, progress=progress)
        except Exception as error:
            if not type(error).__module__.startswith("pamm."):
                traceback.print_exc(file=sys.stderr)
            earlier = f"{failed[run.label]}; " if run.label in failed else ""
            failed[run.label] = f"{earlier}seed {run.seed}: {error}"
            say(f"  failed: {error}")
    return failed
