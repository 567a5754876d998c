"""A run: its folder is started, or found and gone on with; everything that its loop needs is created."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pamm.build import create_tasks
from pamm.data import Batch, open_dataset
from pamm.data.loader import train_loader
from pamm.data.transforms import TrainTransform
from pamm.evaluate import Evaluation
from pamm.experiment import Experiment, check, dump, load
from pamm.models.registry import build_model
from pamm.strict import ConfigError, to_dict
from pamm.training.checkpoint import load_training, recover
from pamm.training.loop import Loop
from pamm.training.optimizer import create_optimizer
from pamm.training.processes import launch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

FREE_KEYS = (
    "data.root",
    *(
        f"train.{key}"
        for key in (
            "workers",
            "save_every",
            "log_every",
            "eval_every",
            "accelerator",
            "devices",
            "nodes",
            "recompute",
        )
    ),
)
"""Leaves that may change when a run resumes: the weights of last/ do not depend on them.

(`eval_every` decides which weights best/ gets; `devices` enters where `accumulate` splits a share for batch normalisation.)
"""


def train(experiment: Experiment, out: Path, *, progress: bool = True) -> Evaluation:
    """Train into the folder `out`, or go on where a run in it stopped; returns the evaluation of the best weights.

    Raises ConfigError, DataError, CheckpointError, TrainingError. A SIGTERM saves and exits with code 143.
    """
    loop, loader = create_loop(experiment, out, progress=progress)
    return loop.run(loader)


def create_loop(experiment: Experiment, out: Path, *, progress: bool = False) -> tuple[Loop, Iterable[list[Batch]]]:
    """Everything a run needs, at the step where it starts or goes on, and the batches of its remaining steps."""
    check(experiment)
    config = experiment.train
    fabric = launch(config)
    start_folder(fabric, experiment, out)
    tasks = create_tasks(experiment)
    data = open_dataset(experiment.data, "train", tasks)
    torch.manual_seed(config.seed)
    network = build_model(experiment.model, tasks, experiment.data.size)
    network.set_recompute(config.recompute)
    if config.compile:
        network.compile(dynamic=False)
    model, optimizer = fabric.setup(network, create_optimizer(network, config))
    state = {"step": 0, "evaluated": 0, "best": math.inf, "best_step": 0}
    if (out / "last").exists():
        state = load_training(out / "last", network, optimizer, state)
    place = {"rank": fabric.global_rank, "world": fabric.world_size, "start_step": state["step"]}
    loader = train_loader(data, TrainTransform(tasks, experiment.data, config.seed), config, **place)
    return Loop(fabric, experiment, out, network, model, optimizer, tasks, state, progress=progress), loader


def start_folder(fabric: Fabric, experiment: Experiment, out: Path) -> None:
    """Create the run folder with its experiment.yaml, or check that the run in it is this one. Raises ConfigError."""
    path = out / "experiment.yaml"
    if fabric.is_global_zero:
        recover(out / "last")
        recover(out / "best")
    fabric.barrier()
    if path.exists() and any((out / name).exists() for name in ("last", "best", "results.json")):
        different = differences(path, experiment)
        if different:
            raise ConfigError(
                f"{out} holds another experiment ({'; '.join(different[:4])}). Choose another folder with --out, or remove this one"
            )
    fabric.barrier()
    if fabric.is_global_zero:
        out.mkdir(parents=True, exist_ok=True)
        dump(experiment, path)


def differences(path: Path, experiment: Experiment) -> list[str]:
    """The leaves in which the experiment written at `path` is another one, each with both values; FREE_KEYS are left out."""
    found, wanted = _flat(to_dict(load(path))), _flat(to_dict(experiment))
    return [
        f"{key}: {found.get(key)} there, {wanted.get(key)} here"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key) and key not in FREE_KEYS
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}
