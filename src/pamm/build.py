"""From an experiment to its tasks and its network."""

from __future__ import annotations

from dataclasses import replace

from pamm.data import dataset_options
from pamm.experiment import Experiment
from pamm.models.model import MultiTaskModel
from pamm.models.registry import build_model
from pamm.recipes import get_recipe
from pamm.strict import ConfigError
from pamm.tasks import Task, create_task


def create_tasks(experiment: Experiment) -> dict[str, Task]:
    """The experiment's tasks in order: what the data set determines (classes, unit), then what the experiment sets.

    Raises ConfigError for a task the data set has no labels for, DataError where the data set's description is absent.
    """
    described = dataset_options(experiment.data)
    tasks = {}
    for name, config in experiment.tasks.items():
        if name not in described:
            raise ConfigError(
                f"the data set '{experiment.data.name}' has no labels for the task '{name}'; it has: {', '.join(described)}"
            )
        try:
            tasks[name] = create_task(name, **(described[name] | config.options | {"weight": config.weight}))
        except ValueError as error:
            raise ConfigError(f"tasks.{name}: {error}") from error
    return tasks


def create_model(experiment: Experiment | str, *, pretrained: bool | None = None) -> MultiTaskModel:
    """The network of an experiment or of a recipe's name.

    pretrained: overrides model.backbone.pretrained (fetch the backbone's weights). Raises ConfigError.
    """
    if isinstance(experiment, str):
        experiment = get_recipe(experiment)
    model = experiment.model
    if pretrained is not None:
        model = replace(model, backbone=replace(model.backbone, pretrained=pretrained))
    return build_model(model, create_tasks(experiment), experiment.data.size)
