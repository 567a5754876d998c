"""Are the synthetic rooms hard? A linear map per task from the features of a backbone with random, frozen weights.

`python linear_probe.py FOLDER` trains nothing but these maps, on the data and with the training of the recipe `rooms-pamm`,
and writes FOLDER/seed-<n>/results.json. A data set on which this does well would tell nothing about decoders.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pamm.build import create_tasks
from pamm.config.experiment import Experiment
from pamm.config.recipes import get_recipe
from pamm.data import open_dataset
from pamm.data.loader import train_loader
from pamm.data.transforms import TrainTransform
from pamm.drawing.table import score_table
from pamm.evaluation.evaluate import Evaluation
from pamm.models.backbone import create_backbone
from pamm.models.model import MultiTaskModel
from pamm.runtime.distributed import launch
from pamm.training.loop import Loop
from pamm.training.optimizer import create_optimizer
from pamm.training.run import start_folder


class LastStage(nn.Module):
    """In a decoder's place: every task is given the backbone's last stage, detached."""

    def __init__(self, tasks: list[str]):
        super().__init__()
        self.tasks = tasks

    def forward(self, stages: list[Tensor]) -> dict[str, Tensor]:
        """S maps (B, C, h, w) → task name → (B, C, h, w)."""
        return dict.fromkeys(self.tasks, stages[-1].detach())


def probe(experiment: Experiment, out: Path) -> Evaluation:
    """Train one Conv1×1 per task on the untrained backbone's last stage, and evaluate it as any other run."""
    fabric = launch(experiment.train)
    start_folder(fabric, experiment, out)
    tasks = create_tasks(experiment)
    torch.manual_seed(experiment.train.seed)
    backbone = create_backbone(experiment.model.backbone, experiment.data.size)
    heads = {name: nn.Conv2d(backbone.channels, task.channels, 1) for name, task in tasks.items()}
    network = MultiTaskModel(backbone, LastStage(list(tasks)), heads, tasks=tasks, settings={"linear probe": True})
    backbone.requires_grad_(False)
    model, optimizer = fabric.setup(network, create_optimizer(network, experiment.train))
    data = open_dataset(experiment.data, "train", tasks)
    loader = train_loader(data, TrainTransform(tasks, experiment.data, experiment.train.seed), experiment.train)
    state = {"step": 0, "evaluated": 0, "best": float("inf"), "best_step": 0}
    return Loop(fabric, experiment, out, network, model, optimizer, tasks, state, progress=True).run(loader)


def main() -> None:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("out", type=Path)
    own.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    plain = own.parse_args()
    base = get_recipe("rooms-pamm")
    rows = []
    for seed in plain.seeds:
        experiment = replace(base, name="linear probe", train=replace(base.train, seed=seed))
        rows.append((f"linear probe, seed {seed}", probe(experiment, plain.out / f"seed-{seed}").row))
    print(score_table(rows, create_tasks(base)))


if __name__ == "__main__":
    main()
