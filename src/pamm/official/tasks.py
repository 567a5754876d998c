"""The tasks of a published checkpoint, from the names and channels of its heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pamm.config.experiment import DataConfig
from pamm.data import DATASETS
from pamm.data.files import PackagedDataset
from pamm.files import shown
from pamm.official.names import OfficialError
from pamm.tasks import TASKS, Task, create_task
from pamm.tasks.segmentation import ClassMap, numbered_classes

ORDER = ("semseg", "depth", "human_parts", "sal", "normals", "edge")
"""The benchmarks' order of tasks."""


def task_order(names: Iterable[str]) -> list[str]:
    """These tasks in the benchmarks' order. Raises OfficialError for an unknown one, or for none."""
    found = sorted(set(names))
    unknown = [name for name in found if name not in TASKS]
    if unknown or not found:
        told = f"the task '{shown(unknown[0])}'" if unknown else "no task's head"
        raise OfficialError(f"the checkpoint holds {told}; the tasks known here are {', '.join(ORDER)}")
    return sorted(found, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def tasks_of(channels: Mapping[str, int], notices: list[str]) -> dict[str, Task]:
    """Task name → task with so many output channels.

    Classes have the names of the benchmark with the same number of them, otherwise numbers; this is added to `notices`. Raises
    OfficialError for a number that a task cannot have.
    """
    tasks, described = {}, dataset_options(channels)
    for name, count in channels.items():
        if issubclass(TASKS[name], ClassMap):
            classes, source = class_names(name, count)
            notices.append(f"{name}: {count} classes, {source}")
            tasks[name] = create_task(name, classes=classes)
        else:
            tasks[name] = create_task(name, **described.get(name, {}))
        if tasks[name].channels != count:
            raise OfficialError(f"the head of '{name}' has {count} channels, expected {tasks[name].channels}")
    return tasks


def dataset_options(channels: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Task name → what a data set determines of it, of the one that has these tasks with so many classes; else empty."""
    for name, dataset in DATASETS.items():
        if issubclass(dataset, PackagedDataset):
            options = dataset.options(DataConfig(name=name))
            classes = {task: len(values["classes"]) for task, values in options.items() if "classes" in values}
            if channels.keys() <= options.keys() and any(
                classes.get(task) == count for task, count in channels.items()
            ):
                return options
    return {}


def class_names(task: str, count: int) -> tuple[list[str], str]:
    """Names of a task's `count` classes and where they come from, in words."""
    for name, dataset in DATASETS.items():
        if issubclass(dataset, PackagedDataset):
            classes = dataset.options(DataConfig(name=name)).get(task, {}).get("classes", ())
            if len(classes) == count:
                return list(classes), f"named as those of the data set '{name}', which has so many"
    return numbered_classes(count), "numbered, because the checkpoint does not name them"
