"""Throughput of a data set's training loader."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from pamm.build import create_tasks
from pamm.data import open_dataset
from pamm.data.loader import train_loader
from pamm.data.transforms import TrainTransform
from pamm.experiment import Experiment


def throughput(experiment: Experiment, batches: int, workers: int) -> dict[str, Any]:
    """Read `batches` batches with so many processes. The time to the first batch, in which they start, is told apart.

    Returns first (seconds), seconds (median, q1, q3, calls: of the later batches), images_per_second (of the later batches).
    Raises DataError, ConfigError.
    """
    tasks = create_tasks(experiment)
    dataset = open_dataset(experiment.data, "train", tasks)
    if hasattr(dataset, "prepare"):
        dataset.prepare(progress=False)
    config = replace(experiment.train, steps=batches + 1, workers=workers, accumulate=1)
    marks = [time.perf_counter()]
    for _ in train_loader(dataset, TrainTransform(tasks, experiment.data, config.seed), config):
        marks.append(time.perf_counter())
    taken = np.diff(marks)
    low, middle, high = np.percentile(taken[1:], [25, 50, 75])
    return {
        "first": taken[0],
        "seconds": {"median": middle, "q1": low, "q3": high, "calls": len(taken) - 1, "cold": False},
        "images_per_second": config.batch * (len(taken) - 1) / (marks[-1] - marks[1]),
    }
