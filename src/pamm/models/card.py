"""The model card that stands beside saved weights: what is known of them, and what is not."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pamm.config.experiment import Experiment, load
from pamm.config.strict import ConfigError
from pamm.files import shown

if TYPE_CHECKING:
    from pamm.models.model import MultiTaskModel

CARD = "README.md"

MARK = "<!-- model card written by pamm -->"
"""Tells a card of this package, which is replaced with its model, from a person's own, which is left alone."""

NAMES = {
    "pamm": "PAMM",
    "pamm-released": "PAMM, as its published code computes it",
    "mtmamba": "MTMamba",
    "mtmamba++": "MTMamba++",
}


@dataclass(frozen=True)
class Origin:
    """What is known of where weights come from: the settings of their run, and its results where they are of these weights."""

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
    decoder, backbone = settings["decoder"]["system"], settings["backbone"]["name"]
    count = sum(p.numel() for p in model.parameters())
    height, width = model.image_size
    parts = [
        MARK,
        f"# {NAMES.get(decoder, decoder)}: {_plain(', '.join(model.tasks))} from one image",
        f"A network of the Python library `pamm`: one RGB image in, a map of every task out, at the image's size. Backbone: "
        f"{_plain(backbone)} (timm). Decoder: `{decoder}`. {count / 1e6:.1f} million parameters. Built for images of "
        f"{height}×{width} pixels; larger ones are shrunk to that longer side, any shape is taken.",
        "## Tasks",
        _tasks(model),
        "## Training",
        _training(origin.experiment),
        "## Scores",
        _scores(model, origin.results),
        "## Use",
        "```python\nfrom pamm import Predictor\n\n"
        'predict = Predictor("FOLDER")  # this folder, or "hf:OWNER/NAME" for a repository of the Hugging Face Hub\n'
        'maps = predict("photograph.jpg")\n'
        f'print(maps["{next(iter(model.tasks))}"].shape)\n```',
        "Or `pamm predict FOLDER photograph.jpg --out predictions`. The weights are safetensors, which hold no code.",
        "## Licence",
        f"The weights: {_plain(licence)}." if licence else "No licence was stated for these weights.",
    ]
    return "\n\n".join(parts) + "\n"


def _tasks(model: MultiTaskModel) -> str:
    lines = ["| task | map | classes |", "|---|---|---|"]
    for name, task in model.tasks.items():
        classes = [_plain(c) for c in getattr(task, "classes", ())]
        listed = f"{len(classes)}: {', '.join(classes)}" if classes else "–"
        lines.append(f"| `{name}` | {task.meaning} | {listed} |")
    return "\n".join(lines)


def _training(experiment: Experiment | None) -> str:
    if experiment is None:
        return "Which data and settings these weights come from is not recorded beside them."
    train = experiment.train
    facts = {
        "experiment": experiment.name,
        "data": f"{experiment.data.name}, frames of {experiment.data.frame[0]}×{experiment.data.frame[1]} pixels",
        "settings of the run": f"{train.steps} steps of {train.batch} images, {train.optimizer}, learning rate {train.lr:g}, "
        f"weight decay {train.weight_decay:g}, seed {train.seed}",
        "backbone": "started from timm's pretrained weights" if experiment.model.backbone.pretrained else "",
    }
    lines = [f"- {key}: {_plain(value)}" for key, value in facts.items() if value]
    return "\n".join([*lines, "", "The weights are those of one step of this run, not necessarily its last."])


def _scores(model: MultiTaskModel, results: Mapping[str, Any] | None) -> str:
    if results is None:
        return "No scores of these weights are recorded beside them."
    lines = ["| task | metric | score |", "|---|---|---:|"]
    for name, task in model.tasks.items():
        metrics = results["results"].get(name)
        value = metrics.get(task.score) if isinstance(metrics, dict) else None
        known = isinstance(value, (int, float)) and math.isfinite(value)
        better = "higher is better" if task.higher_is_better else "lower is better"
        lines.append(f"| `{name}` | {task.titled(task.score)} ({better}) | {f'{value:.4g}' if known else '–'} |")
    protocol = results.get("protocol")
    return "\n".join(
        [*lines, "", f"Measured by `pamm`: {_plain(protocol)}." if isinstance(protocol, str) else ""]
    ).rstrip()


def _plain(text: object) -> str:
    """Text from outside on one line, in which no character has a meaning for Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", shown(text, 300))
