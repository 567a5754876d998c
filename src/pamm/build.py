"""From an experiment to its tasks and its network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pamm.config.experiment import Experiment
from pamm.config.recipes import get_recipe
from pamm.config.strict import ConfigError, check_choice
from pamm.data import dataset_class, dataset_options
from pamm.models.model import MultiTaskModel
from pamm.models.registry import build_model
from pamm.nn.serialize import CURVES
from pamm.tasks import TASKS, Task, create_task, option_defaults


def create_tasks(experiment: Experiment) -> dict[str, Task]:
    """Build the tasks of an experiment, in its order.

    The experiment's options take precedence over those that the data set determines (classes, unit).

    Args:
        experiment: the experiment.

    Returns:
        Task name → task.

    Raises:
        ConfigError: the data set has no labels for a task, or a task does not take an option.
        DataError: the data set has no readable description.
    """
    check_options(experiment)
    described = label_options(experiment)
    absent = [name for name in experiment.tasks if name not in described]
    if absent:
        present = " ".join(name for name in experiment.tasks if name in described)
        remedy = f"; leave it out with --tasks {present}" if present else ""
        raise ConfigError(
            f"the data set '{experiment.data.name}' has no labels for the task '{absent[0]}'; it has: "
            f"{', '.join(described)}{remedy}"
        )
    return {name: _create(name, described[name], config.weight) for name, config in experiment.tasks.items()}


def label_options(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Task → options by which its labels are read and measured, for every task of the data set.

    What the data set determines, then what the experiment sets: whatever reads this experiment's labels takes these.
    """
    described = dataset_options(experiment.data)
    own = {name: config.options for name, config in experiment.tasks.items()}
    return {name: options | own.get(name, {}) for name, options in described.items()}


def check_options(experiment: Experiment) -> None:
    """Raises ConfigError for what nothing is registered for (data set, scan curve, task), for an option that a task does not
    have, and for a value that the option does not take."""
    dataset_class(experiment.data)
    if isinstance(curve := getattr(experiment.model.decoder, "scan", None), str):
        check_choice("model.decoder.scan", curve, CURVES)
    for name, config in experiment.tasks.items():
        if "weight" in config.options:
            raise ConfigError(
                f"tasks.{name}.options.weight: the weight of a task's loss is no option of the task; set tasks.{name}.weight"
            )
        _create(name, config.options, config.weight)


def options_help(experiment: Experiment) -> str:
    """Every option of the experiment's tasks with the value it has, as text for a terminal."""
    lines = [
        "Options of a task, --tasks.TASK.options.OPTION VALUE (in YAML, tasks: {TASK: {options: {OPTION: VALUE}}}):",
        "",
    ]
    for name, config in experiment.tasks.items():
        if name in TASKS:
            values = {key: value for key, value in option_defaults(name).items() if key != "weight"} | config.options
            listed = ", ".join(
                f"{key} ({'of the data set' if value is None else value})" for key, value in values.items()
            )
            lines += [f"{name}: {listed or 'none'}", ""]
    return "\n".join(
        [*lines, "What the data set says of its labels (classes, unit, tolerance) holds where nothing is set here."]
    )


def _create(name: str, options: Mapping[str, Any], weight: float) -> Task:
    try:
        return create_task(name, **options, weight=weight)
    except ValueError as error:
        raise ConfigError(f"tasks.{name}: {error}") from error


def create_model(experiment: Experiment | str, *, pretrained: bool = False, device: str = "cpu") -> MultiTaskModel:
    """Build the network of an experiment.

    Args:
        experiment: an experiment, or the name of a recipe (see `pamm.list_recipes`), e.g. "nyud-pamm-b+no-experts".
        pretrained: start from the backbone's pretrained weights, which timm downloads once. The experiment's own setting,
            `model.backbone.pretrained`, is what `pamm train` goes by.
        device: "cpu", or "meta" for weights that have shapes and take no memory.

    Returns:
        The network, in training mode.

    Raises:
        ConfigError: an unknown recipe, settings that do not fit together, or weights that cannot be downloaded.
        DataError: the data set has no readable description.
    """
    if isinstance(experiment, str):
        experiment = get_recipe(experiment)
    model = replace(experiment.model, backbone=replace(experiment.model.backbone, pretrained=pretrained))
    return build_model(model, create_tasks(experiment), experiment.data.size, device)
