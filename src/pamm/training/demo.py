"""`pamm demo`: synthetic rooms, training, evaluation and a report, in minutes on a CPU."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from pamm.build import create_model, create_tasks
from pamm.config.experiment import Experiment
from pamm.config.strict import ConfigError
from pamm.data import open_dataset
from pamm.data.transforms import EvalTransform
from pamm.drawing.page import Figure, figure_from, write_report
from pamm.drawing.table import score_table
from pamm.evaluation.evaluate import evaluate_split
from pamm.kernels import Choice
from pamm.kernels.prepare import prepare
from pamm.models.saved import load_model
from pamm.runtime.distributed import launch
from pamm.training.lock import FolderLock
from pamm.training.run import train

FIGURES = 8
"""Validation images shown in the report."""


def run_demo(experiment: Experiment, out: Path, *, progress: bool = True, kernels: Choice = "auto") -> Path:
    """Make the data, measure the untrained network, train, measure again, and write the report.

    Args:
        experiment: the experiment to train, on synthetic rooms.
        out: the run folder.
        progress: show bars on the standard error.
        kernels: see `pamm.training.run.train`.

    Returns:
        Path of the report.

    Raises:
        PammError: as `pamm.training.run.train`.
    """
    if experiment.data.name != "synthetic":
        raise ConfigError(
            "pamm demo shows the synthetic rooms; for your own images: pamm train folder-pamm --data.root FOLDER"
        )
    out.mkdir(parents=True, exist_ok=True)
    FolderLock(out).release()  # an error now if another process uses the folder, not after the rooms are made
    started = time.perf_counter()
    tasks = create_tasks(experiment)
    for split in ("train", "val"):
        open_dataset(experiment.data, split, tasks).prepare(progress=progress, workers=os.cpu_count() or 1)
    fabric = launch(experiment.train)
    torch.manual_seed(experiment.train.seed)
    blank = prepare(
        create_model(experiment, pretrained=experiment.model.backbone.pretrained).to(fabric.device), kernels=kernels
    )
    untrained = evaluate_split(fabric, blank, experiment, tasks)
    made = time.perf_counter()
    trained = train(experiment, out, progress=progress, kernels=kernels)
    rows = [("untrained", untrained.row), ("trained", trained.row)]
    report = write_report(
        out,
        title=f"PAMM on synthetic rooms: {experiment.train.steps} steps",
        rows=rows,
        tasks=tasks,
        protocol=trained.protocol,
        figures=draw_figures(experiment, out, kernels),
        extra={"seconds of data": f"{made - started:.0f}", "seconds of training": f"{time.perf_counter() - made:.0f}"},
    )
    print(score_table(rows, tasks))
    print(f"{trained.protocol}\nreport: {report} ({time.perf_counter() - started:.0f} s in all)")
    return report


@torch.inference_mode()
def draw_figures(experiment: Experiment, run: Path, kernels: Choice) -> list[Figure]:
    """Predictions and truths of the first validation images."""
    model = prepare(load_model(run), kernels=kernels)
    data = open_dataset(experiment.data, "val", model.tasks)
    transform = EvalTransform(model.tasks, experiment.data)
    figures = []
    for index in range(min(FIGURES, len(data))):
        sample = transform(data[index])
        logits = {name: x[0] for name, x in model(sample.image[None]).items()}
        figures.append(figure_from(sample.image, sample.labels, logits, model.tasks, sample.id))
    return figures
