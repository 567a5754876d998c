"""Data sets and their transforms: one file each. Importing this package registers every data set in it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pamm.data.sample import DATASETS, Batch, DataError, Dataset, Sample, collate, dataset_class, register_dataset
from pamm.tasks import Task

if TYPE_CHECKING:
    from pamm.config.experiment import DataConfig

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def dataset_options(config: DataConfig) -> dict[str, dict[str, Any]]:
    """Arguments of `create_task` that the data set determines (its classes, its unit).

    Args:
        config: the data set's settings.

    Returns:
        Task name → arguments.

    Raises:
        ConfigError: no data set is registered under this name.
        DataError: its description cannot be read.
    """
    return dataset_class(config).options(config)


def open_dataset(config: DataConfig, split: str, tasks: Mapping[str, Task]) -> Dataset:
    """Open a split of the configured data set.

    Args:
        config: the data set's settings.
        split: "train", "val" or another split of the data set.
        tasks: tasks whose labels are read.

    Returns:
        The split.

    Raises:
        ConfigError: no data set is registered under this name.
        DataError: a folder, file or label is missing or wrong.
    """
    return dataset_class(config).open(config, split, tasks)


__all__ = [
    "DATASETS",
    "Batch",
    "DataError",
    "Dataset",
    "Sample",
    "collate",
    "dataset_class",
    "dataset_options",
    "open_dataset",
    "register_dataset",
]
