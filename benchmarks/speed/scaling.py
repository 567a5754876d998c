"""How the cost of a decoder and its heads grows with tokens, tasks, experts and state size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pamm.build import create_model
from pamm.config.experiment import DataConfig, Experiment, TaskConfig
from pamm.config.recipes import get_recipe
from pamm.kernels import accelerate
from speed.measure import Candidate, Workload
from speed.model import predicting

TASKS = ("semseg", "human_parts", "sal", "normals", "edge", "depth")
PATCH = 16

AXES: dict[str, tuple[int, ...]] = {
    "tokens": (256, 1024, 4096, 16384),
    "tasks": (1, 2, 4, 6),
    "experts": (15, 30, 60),
    "state": (16, 64, 128),
}
"""What varies → the values measured; the others stay at 1024 tokens, five tasks, 15 experts, the recipe's state size."""


class Unlike(NamedTuple):
    """Outputs that are not compared with the other candidate's."""

    stages: list[Tensor]


def workload(settings: Mapping[str, Any], only: str | None = None) -> Workload:
    """Candidates "decoder and heads" and, where asked for, "backbone". settings: recipe, axis, value, dtype, device, candidates."""
    experiment = varied(get_recipe(settings["recipe"]), settings["axis"], settings["value"])
    model = create_model(experiment).to(settings["device"]).eval()
    accelerate(model, training=False)
    size = experiment.data.size
    image = torch.randn(1, 3, *size, device=settings["device"])
    grid = [side // PATCH for side in size]
    stages = [
        torch.randn(1, model.backbone.channels, *grid, device=settings["device"]) for _ in model.backbone.out_indices
    ]
    known = {
        "decoder and heads": predicting(model.decode, stages, size, settings),
        "backbone": predicting(lambda given, _: Unlike(model.backbone(given)), image, size, settings),
    }
    found = {name: Candidate(known[name]) for name in ([only] if only else settings["candidates"])}
    shape = {"recipe": settings["recipe"], "axis": settings["axis"], "value": settings["value"], "size": list(size)}
    return Workload(found, shape | {"tasks": list(model.tasks)}, images=1)


def varied(experiment: Experiment, axis: str, value: int) -> Experiment:
    """The recipe on synthetic data (all six tasks) with one quantity changed."""
    side = PATCH * round((value if axis == "tokens" else 1024) ** 0.5)
    names = TASKS[: value if axis == "tasks" else 5]
    decoder = experiment.model.decoder
    if axis == "experts":
        kept = min(decoder.experts.top_k, value)
        decoder = replace(decoder, experts=replace(decoder.experts, count=value, top_k=kept))
    elif axis == "state":
        decoder = replace(decoder, state_size=value)
    return replace(
        experiment,
        tasks={name: TaskConfig() for name in names},
        data=DataConfig(name="synthetic", size=(side, side), images=(1, 1)),
        model=replace(experiment.model, decoder=decoder),
    )
