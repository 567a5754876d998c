"""Finished runs measured on other splits than the one that training evaluates on (`pamm ablate --split`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pamm.ablate.runs import FINISHED, Plan, Run
from pamm.build import create_tasks, label_options
from pamm.config.strict import read_json
from pamm.data import open_dataset
from pamm.evaluation.evaluate import evaluate_split
from pamm.models.saved import load_model
from pamm.runtime.distributed import launch
from pamm.tasks import create_task

Splits = Mapping[str, str]
"""Task → the split it is measured on; tasks that are absent are measured where training evaluates."""


def check_splits(plan: Plan) -> None:
    """Open every split that is to be measured, before anything is trained. Raises DataError where one is not there."""
    opened = set()
    for run in plan.runs:
        described = label_options(run.experiment)
        for split, tasks in chosen(run, plan.splits).items():
            if (key := (run.experiment.data, split, tuple(tasks))) not in opened:
                opened.add(key)
                open_dataset(run.experiment.data, split, {task: create_task(task, **described[task]) for task in tasks})


def chosen(run: Run, splits: Splits) -> dict[str, list[str]]:
    """Split → the run's tasks that are to be measured on it."""
    found: dict[str, list[str]] = {}
    for task in run.experiment.tasks:
        if task in splits:
            found.setdefault(splits[task], []).append(task)
    return found


def results_on(run: Run, splits: Splits) -> tuple[dict[str, dict[str, float | None]], list[str]] | None:
    """Task → metric → value of a finished run, each task on its split, and the protocols; None where one is not measured.

    Raises GainError for a file that is not one of results.
    """
    own = run.content()
    if own is None:
        return None
    found, protocols = dict(own["results"]), [own["protocol"]] if run.experiment.tasks.keys() - splits else []
    for split, tasks in chosen(run, splits).items():
        other = _measured(run, split, tasks, own)
        if other is None:
            return None
        found |= {task: other["results"][task] for task in tasks}
        protocols.append(f"{', '.join(tasks)}: {other['protocol']}")
    return found, protocols


def _measured(run: Run, split: str, tasks: list[str], own: Mapping[str, Any]) -> dict[str, Any] | None:
    """The file of results on a split, if it holds these tasks and is of the weights of `own`."""
    try:
        content = read_json(run.folder / f"results-{split}.json", finite=False)
        fits = content["model"] == own["model"] and content["results"].keys() >= set(tasks)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # absent, cut off, or another file: measured again
        return None
    return content if fits else None


def measure_all(plan: Plan, *, progress: bool, say: Callable[[str], None]) -> dict[str, str]:
    """Measure every finished run on its splits, once; returns label of a row → reason of a failure."""
    failed: dict[str, str] = {}
    for run in {run.folder: run for run in plan.runs if run.state() == FINISHED}.values():
        own = run.content() or {}  # finished: it has one
        for split, tasks in chosen(run, plan.splits).items():
            if _measured(run, split, tasks, own) is not None:
                continue
            say(f"{run.label}, seed {run.seed}: {', '.join(tasks)} on the split '{split}'")
            try:
                _measure(run, split, tasks, own, progress=progress)
            except Exception as error:
                if not type(error).__module__.startswith("pamm."):
                    raise
                failed[run.label] = f"seed {run.seed}: {error}"
                say(f"  failed: {error}")
    return failed


def _measure(run: Run, split: str, tasks: list[str], own: Mapping[str, Any], *, progress: bool) -> None:
    """Evaluate the run's best weights and write <folder>/results-<split>.json."""
    fabric = launch(run.experiment.train)
    model = load_model(run.folder).to(fabric.device)
    wanted = {name: task for name, task in create_tasks(run.experiment).items() if name in tasks}
    result = evaluate_split(fabric, model, run.experiment, wanted, split=split, progress=progress)
    if fabric.is_global_zero:
        replace(result, model=own["model"]).save(run.folder / f"results-{split}.json")
    fabric.barrier()
