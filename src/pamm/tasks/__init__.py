"""Tasks: one file each. Importing this package registers every task file in it."""

import importlib
import pkgutil

from pamm.tasks.task import (
    TASKS,
    LabelError,
    LabelStatistics,
    NonFiniteError,
    Task,
    create_task,
    list_tasks,
    option_defaults,
    register,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "TASKS",
    "LabelError",
    "LabelStatistics",
    "NonFiniteError",
    "Task",
    "create_task",
    "list_tasks",
    "option_defaults",
    "register",
]
