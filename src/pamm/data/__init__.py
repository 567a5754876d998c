"""Data sets and their transforms: one file each. Importing this package registers every data set in it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pamm.data.sample import DATASETS, Batch, DataError, Dataset, Sample, collate, register_dataset
from pamm.tasks import Task

if TYPE_CHECKING:
    from pamm.config.experiment import DataConfig

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def dataset_options(config: DataConfig) -> dict[str, dict[str, Any]]:
    """Task name → arguments of `create_task` that the data set determines (its classes, its unit)."""
    return DATASETS[config.name].options(config)


def open_dataset(config: DataConfig, split: str, tasks: Mapping[str, Task]) -> Dataset:
    """The split ("train" or "val") of the configured data set. Raises DataError where something is absent."""
    return DATASETS[config.name].open(config, split, tasks)


__all__ = [
    "DATASETS",
    "Batch",
    "DataError",
    "Dataset",
    "Sample",
    "collate",
    "dataset_options",
    "open_dataset",
    "register_dataset",
]
