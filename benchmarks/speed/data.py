"""Throughput of a data set's training loader."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from pamm.build import create_tasks
from pamm.config.experiment import Experiment
from pamm.data import open_dataset
from pamm.data.loader import train_loader
from pamm.data.transforms import TrainTransform


def throughput(experiment: Experiment, batches: int, workers: int) -> dict[str, Any]:
    """Time `batches` batches with so many processes, after a first one for each: what they read ahead meanwhile is not counted.

    Returns first (seconds until the first batch, in which the processes start), seconds (median, q1, q3, calls) and
    images_per_second of the timed batches. Raises DataError, ConfigError.
    """
    tasks = create_tasks(experiment)
    dataset = open_dataset(experiment.data, "train", tasks)
    if hasattr(dataset, "prepare"):
        dataset.prepare(progress=False)
    ahead = 1 + workers
    config = replace(experiment.train, steps=batches + ahead, workers=workers, accumulate=1)
    marks = [time.perf_counter()]
    for _ in train_loader(dataset, TrainTransform(tasks, experiment.data, config.seed), config):
        marks.append(time.perf_counter())
    taken = np.diff(marks)
    low, middle, high = np.percentile(taken[ahead:], [25, 50, 75])
    return {
        "first": taken[0],
        "seconds": {"median": middle, "q1": low, "q3": high, "calls": batches, "cold": False},
        "images_per_second": config.batch * batches / (marks[-1] - marks[ahead]),
    }
