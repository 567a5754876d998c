"""A training step: forward, losses, backward, optimizer; this package's form and the plain form."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pamm.build import create_model
from pamm.kernels import accelerate
from pamm.models.model import MultiTaskModel
from pamm.tasks import Task
from pamm.training.optimizer import create_optimizer
from speed.measure import Candidate, Workload
from speed.model import (
    PLAIN,
    arithmetic,
    drop_decoder,
    experiment_of,
    plain_decoder,
    with_backbone,
)


def workload(settings: Mapping[str, Any], only: str | None = None) -> Workload:
    """Candidates "pamm", "pamm, recomputed", "plain, engine", "plain, recurrence", or the one named; each with an optimizer.

    settings: recipe, size (H, W) or None, batch, dtype, device, candidates. Images and labels are random.
    """
    experiment = experiment_of(settings)
    size, frame = experiment.data.size, experiment.data.label_size or experiment.data.size
    model = create_model(experiment).to(settings["device"]).train()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(settings["batch"], 3, *size, generator=generator).to(settings["device"])
    labels = {
        name: random_label(task, settings["batch"], frame, generator).to(settings["device"])
        for name, task in model.tasks.items()
    }
    found = {}
    names = [only] if only else settings["candidates"]
    plain = copy.deepcopy(model.backbone) if set(names) & set(PLAIN) and not only else model.backbone
    if only not in PLAIN:
        accelerate(model, training=True)
    for name in names:
        trained: nn.Module = model
        call: Callable = keeping(model, grad_checkpointing=name == "pamm, recomputed")
        if name in PLAIN:
            decoder = plain_decoder(model, experiment, PLAIN[name])
            backbone = plain if only else copy.deepcopy(plain)
            trained = nn.ModuleList([backbone, decoder])
            call = with_backbone(backbone, decoder)
        optimizer = create_optimizer(trained, experiment.train)
        found[name] = Candidate(stepping(call, optimizer, image, labels, frame, model.tasks, settings))
    if only in PLAIN:
        drop_decoder(model)
    shape = {"recipe": settings["recipe"], "batch": settings["batch"], "size": list(size), "tasks": list(labels)}
    return Workload(found, shape, images=settings["batch"], memory_calls=2)


def keeping(model: MultiTaskModel, *, grad_checkpointing: bool) -> Callable:
    """The network with its activations kept, or made again in the backward pass."""

    def call(image: Tensor, frame: tuple[int, int]) -> dict[str, Tensor]:
        model.set_grad_checkpointing(grad_checkpointing)
        return model(image, frame)

    return call


def random_label(task: Task, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(B, c, H, W) of zeros and ones, which are values of every task's labels."""
    shape = (batch, task.label_channels, *size)
    return torch.randint(0, 2, shape, generator=generator).to(task.label_dtype)


def stepping(
    call: Callable,
    optimizer: torch.optim.Optimizer,
    image: Tensor,
    labels: Mapping[str, Tensor],
    frame: tuple[int, int],
    tasks: Mapping[str, Task],
    settings: Mapping[str, Any],
) -> Callable[[], None]:
    """One step. Stochastic depth and the routers' noise differ between the forms, so no output is compared."""

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with arithmetic(settings["device"], settings["dtype"]):
            logits = call(image, frame)
        total = sum(task.weight * task.loss(logits[name].float(), labels[name]) for name, task in tasks.items())
        total.backward()
        optimizer.step()

    return run
