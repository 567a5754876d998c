"""The model card that stands beside saved weights: what is known of them, and what is not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pamm.config.experiment import Experiment, load
from pamm.config.strict import ConfigError
from pamm.drawing.render import render
from pamm.drawing.table import MISSING, Table
from pamm.files import shown

if TYPE_CHECKING:
    from pamm.models.model import MultiTaskModel
    from pamm.tasks import Task

CARD = "README.md"

MARK = "<!-- model card written by pamm -->"
"""Marks a card of this package, which is replaced with its model; a person's own card is not."""

NAMES = {
    "pamm": "PAMM",
    "pamm-released": "PAMM, as its published code computes it",
    "mtmamba": "MTMamba",
    "mtmamba++": "MTMamba++",
    "invpt": "InvPT",
    "taskprompter": "TaskPrompter",
    "mlore": "MLoRE",
}


@dataclass(frozen=True)
class Origin:
    """The origin of weights: the settings of their run, and its results if they belong to these weights."""

    experiment: Experiment | None = None
    results: Mapping[str, Any] | None = None


def read_origin(folder: Path, *, unchanged: bool) -> Origin:
    """The origin of the weights in `best/` or `last/` of a run folder, by the files beside it; empty for any other folder.

    Results are those of best/, if they were written after its weights. unchanged: the weights are still those in the folder.
    """
    if folder.name not in ("best", "last"):
        return Origin()
    try:
        experiment = load(folder.parent / "experiment.yaml")
    except ConfigError:
        return Origin()
    path, weights = folder.parent / "results.json", folder / "model.safetensors"
    try:
        if not unchanged or folder.name != "best" or path.stat().st_mtime_ns < weights.stat().st_mtime_ns:
            return Origin(experiment)
        results = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(results["results"], dict) and results["model"]["weights"] == "best"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Origin(experiment)
    return Origin(experiment, results if known else None)


def write_card(model: MultiTaskModel, origin: Origin, licence: str | None) -> str:
    """The card's text in Markdown, without the metadata above it. licence: of the weights, None where none was stated."""
    settings = model.settings["model"]
    decoder = settings["decoder"]["system"]
    results = origin.results or {}
    page = render(
        "card.md",
        name=NAMES.get(decoder, decoder),
        decoder=decoder,
        backbone=settings["backbone"]["name"],
        parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
        size="{}×{}".format(*model.image_size),
        tasks=list(model.tasks),
        task_table=Table([["task", "map", "classes"], *map(_task_line, model.tasks.values())], align="<"),
        facts=_facts(origin.experiment) if origin.experiment else {},
        scores=_scores(model.tasks, results["results"]) if results else None,
        protocol=_outside(results.get("protocol")) if isinstance(results.get("protocol"), str) else "",
        licence=_outside(licence or ""),
    )
    return f"{MARK}\n\n{page}"


def _task_line(task: Task) -> list[str]:
    classes = [_outside(name) for name in getattr(task, "classes", ())]
    return [task.name, task.meaning, f"{len(classes)}: {', '.join(classes)}" if classes else MISSING]


def _facts(experiment: Experiment) -> dict[str, str]:
    data, train = experiment.data, experiment.train
    facts = {
        "experiment": experiment.name,
        "data": f"{data.name}, frames of {data.frame[0]}×{data.frame[1]} pixels",
        "settings of the run": f"{train.steps} steps of {train.batch} images, {train.optimizer}, learning rate {train.lr:g}, "
        f"weight decay {train.weight_decay:g}, seed {train.seed}",
    }
    if experiment.model.backbone.pretrained:
        facts["backbone"] = "started from timm's pretrained weights"
    return {name: _outside(value) for name, value in facts.items()}


def _scores(tasks: Mapping[str, Task], results: Mapping[str, Any]) -> Table:
    lines = [["task", "metric", "score"]]
    for name, task in tasks.items():
        metrics = results.get(name)
        value = metrics.get(task.score) if isinstance(metrics, dict) else None
        known = isinstance(value, (int, float)) and math.isfinite(value)
        better = "higher is better" if task.higher_is_better else "lower is better"
        lines.append([name, f"{task.titled(task.score)} ({better})", f"{value:.4g}" if known else MISSING])
    return Table(lines, align="<<>")


def _outside(text: object) -> str:
    """Text from outside, of a length that fits a card."""
    return shown(text, 300)
