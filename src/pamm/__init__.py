"""PAMM and MTMamba: one image in, segmentation, parts, depth, normals, saliency and boundaries out.

Public names are imported when first used, so that `import pamm` takes milliseconds.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pamm.build import create_model
    from pamm.config.experiment import Experiment
    from pamm.config.recipes import get_recipe, list_recipes
    from pamm.kernels import accelerate
    from pamm.models.model import MultiTaskModel
    from pamm.models.saved import load_model
    from pamm.ops import selective_scan
    from pamm.prediction import Predictor
    from pamm.tasks import Task, create_task, list_tasks

_HOME = {
    "Experiment": "pamm.config.experiment",
    "MultiTaskModel": "pamm.models.model",
    "Predictor": "pamm.prediction",
    "Task": "pamm.tasks",
    "accelerate": "pamm.kernels",
    "create_model": "pamm.build",
    "create_task": "pamm.tasks",
    "get_recipe": "pamm.config.recipes",
    "list_recipes": "pamm.config.recipes",
    "list_tasks": "pamm.tasks",
    "load_model": "pamm.models.saved",
    "selective_scan": "pamm.ops",
}

__all__ = [
    "Experiment",
    "MultiTaskModel",
    "PammError",
    "Predictor",
    "Task",
    "accelerate",
    "create_model",
    "create_task",
    "get_recipe",
    "list_recipes",
    "list_tasks",
    "load_model",
    "selective_scan",
]


class PammError(Exception):
    """Above every error of this package; its message says what was found, what was expected and what to do."""


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("pamm")
    if name == "official":
        return importlib.import_module("pamm.official")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pamm' has no attribute '{name}'; it has: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
