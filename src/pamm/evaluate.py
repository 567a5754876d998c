"""Every task's metrics and validation loss over a split, the same number for any number of processes and any batch size."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from pamm.data import Batch, dataset_options, open_dataset
from pamm.data.loader import eval_loader
from pamm.data.transforms import EvalTransform
from pamm.experiment import Experiment, load
from pamm.files import replace_text
from pamm.models.model import MultiTaskModel
from pamm.models.registry import rebuild_model
from pamm.models.saved import find_checkpoint, load_model
from pamm.nn.joined import world_size
from pamm.precision import Precision, choose_precision, prepare
from pamm.recipes import get_recipe
from pamm.strict import ConfigError
from pamm.tasks import Task, create_task
from pamm.tasks.segmentation import numbered_classes

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Row = dict[str, dict[str, float]]
"""Task name → metric name → value. Percent where the field prints percent, NaN where no image has the label."""

SIGNIFICANT_DIGITS = 6


@dataclass(frozen=True)
class Evaluation:
    """One row of results and what it was measured on."""

    row: Row
    images: int
    protocol: str
    """Split, number of images, frame and treatment of padding, in words."""
    model: dict[str, Any] = field(default_factory=dict)
    """Where the weights came from."""

    def total_loss(self, tasks: Mapping[str, Task]) -> float:
        """Σ weight · validation loss over the tasks that have labels; infinity if none has."""
        losses = {name: self.row[name]["loss"] for name in tasks}
        labelled = [task.weight * losses[name] for name, task in tasks.items() if not math.isnan(losses[name])]
        return sum(labelled) if labelled else math.inf

    def save(self, path: Path) -> None:
        """Write as JSON; a value that is not finite becomes null."""
        row = {t: {k: v if math.isfinite(v) else None for k, v in metrics.items()} for t, metrics in self.row.items()}
        text = {"protocol": self.protocol, "images": self.images, "model": self.model, "results": row}
        replace_text(path, json.dumps(text, indent=1) + "\n")


class LossMean:
    """The validation loss of one task: Σ over images of loss · valid pixels / Σ valid pixels."""

    def __init__(self, task: Task):
        self.task = task
        self.sums = torch.zeros(2, dtype=torch.float64)

    def update(self, logits: Tensor, label: Tensor) -> None:
        """One image, (1, channels, H, W) and (1, c, H, W); loss balancing, where a task has it, is per image."""
        count = self.task.counts(label)[0].cpu()
        if count > 0:
            self.sums += torch.stack([self.task.loss(logits, label).double().cpu() * count, count.double()])

    def compute(self, device: torch.device) -> float:
        """The mean over all processes' images; NaN without any label, infinity where the network's output is not finite."""
        sums = self.sums.to(device)
        if world_size() > 1:
            dist.all_reduce(sums)
        if sums[1] == 0:
            return math.nan
        mean = float(sums[0] / sums[1])
        return mean if math.isfinite(mean) else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    tasks: Mapping[str, Task],
    *,
    device: torch.device | str = "cpu",
    quick: bool = False,
    progress: bool = False,
) -> Row:
    """Evaluate `model` on this process's share of the images; the result covers the shares of all processes.

    quick: a stand-in for metrics that take long (see `Task.quick_metric`).

    On a CPU a batch runs image by image, which costs nothing there and keeps the arithmetic of an image independent of its
    neighbours. Values are rounded to 6 significant digits, below which the order of float32 sums shows.
    """
    device = torch.device(device)
    home = device if device.type != "mps" else torch.device("cpu")  # sums are float64, which MPS lacks
    metrics = {name: (task.quick_metric() if quick else task.metric()).to(home) for name, task in tasks.items()}
    losses = {name: LossMean(task) for name, task in tasks.items()}
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not progress):
            for image, labels in _parts(batch, device):
                logits = model(image, batch.label_size)
                for name in tasks:
                    metrics[name].update(logits[name], labels[name])
                    for one, label in zip(logits[name].split(1), labels[name].split(1), strict=True):
                        losses[name].update(one, label)
        return {name: _row(metrics[name], losses[name], home) for name in tasks}
    finally:
        model.train(was_training)


def _parts(batch: Batch, device: torch.device) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
    """The batch on the device: whole, or image by image on a CPU."""
    size = 1 if device.type == "cpu" else len(batch.ids)
    for start in range(0, len(batch.ids), size):
        rows = slice(start, start + size)
        yield batch.image[rows].to(device), {name: label[rows].to(device) for name, label in batch.labels.items()}


def _row(metric: Any, loss: LossMean, device: torch.device) -> dict[str, float]:
    values = {key: float(value) for key, value in metric.compute().items()} | {"loss": loss.compute(device)}
    return {key: float(f"{value:.{SIGNIFICANT_DIGITS}g}") for key, value in values.items()}


def evaluate_split(
    fabric: Fabric,
    model: nn.Module,
    experiment: Experiment,
    tasks: Mapping[str, Task],
    *,
    split: str = "val",
    batch_size: int = 8,
    quick: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Evaluate `model`, which is on the fabric's device, on a split, sharded over the fabric's processes.

    tasks: what is measured. Labels are read and measured as the data set describes them (unit, tolerance of boundaries),
    which need not be as the model's. quick: see `evaluate`.
    """
    config = experiment.data
    described = dataset_options(config)
    readers = {name: create_task(name, **described[name]) for name in tasks}
    measured = {name: create_task(name, **(task.options() | described[name])) for name, task in tasks.items()}
    data = open_dataset(config, split, readers)
    loader = eval_loader(
        data,
        EvalTransform(readers, config),
        rank=fabric.global_rank,
        world=fabric.world_size,
        batch_size=batch_size,
        workers=experiment.train.workers,
    )
    row = evaluate(model, loader, measured, device=fabric.device, quick=quick, progress=progress)
    shrunk = "larger images shrunk to fit, " if config.fit else ""
    shrunk += f"seen at {config.size[0]}×{config.size[1]}, " if config.frame != config.size else ""
    protocol = (
        f"{config.name} {split} split, {len(data)} images, frame {config.frame[0]}×{config.frame[1]} ({shrunk}centred, padding "
        "ignored), maps compared at the frame's resolution, single scale"
    )
    return Evaluation(row, len(data), protocol)


def evaluate_saved(
    source: str,
    fabric: Fabric,
    *,
    data: str | None = None,
    root: str | None = None,
    split: str = "val",
    batch_size: int = 8,
    workers: int = 2,
    untrained: bool = False,
    precision: Precision = "float32",
    compile: bool = False,
) -> tuple[list[tuple[str, Row]], Evaluation, dict[str, Task]]:
    """Evaluate a saved model: rows for a table (with the untrained network's, if asked), the result, the tasks.

    source: what `load_model` takes. data: recipe or experiment.yaml whose data set is measured; the run's own by default.
    precision, compile: as `pamm.precision.prepare` takes them.
    Raises CheckpointError, ConfigError, DataError.
    """
    model = load_model(source)
    experiment = saved_experiment(source, data, root)
    tasks = measurable_tasks(model, experiment)
    experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, workers=workers))
    arguments = {"split": split, "batch_size": batch_size, "progress": fabric.is_global_zero and sys.stderr.isatty()}
    rows = []
    if untrained:
        torch.manual_seed(experiment.train.seed)
        blank = prepare(rebuild_model(model.settings).to(fabric.device), precision=precision, compile=compile)
        rows.append(("untrained", evaluate_split(fabric, blank, experiment, tasks, **arguments).row))
    model = prepare(model.to(fabric.device), precision=precision, compile=compile)
    result = evaluate_split(fabric, model, experiment, tasks, **arguments)
    weights = find_checkpoint(Path(source)).name if Path(source).exists() else "hub"
    arithmetic = str(choose_precision(precision, fabric.device)).removeprefix("torch.")
    details = {"source": source, "weights": weights.strip("."), "precision": arithmetic}
    result = dataclasses.replace(result, model=details)
    return [*rows, (Path(source).name or source, result.row)], result, tasks


def saved_experiment(source: str, data: str | None, root: str | None) -> Experiment:
    """The experiment whose data a saved model is measured on: the one named by `data`, or the run's own."""
    if data is not None:
        path = Path(data)
        experiment = load(path) if path.suffix in (".yaml", ".yml") else get_recipe(data)
    else:
        folders = [Path(source).expanduser(), Path(source).expanduser().parent]
        found = next((f / "experiment.yaml" for f in folders if (f / "experiment.yaml").is_file()), None)
        if found is None:
            raise ConfigError(
                f"no experiment.yaml beside {source}: say on which data to measure, e.g. --data mosaic-pamm"
            )
        experiment = load(found)
    if root is not None:
        experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, root=root))
    return experiment


def measurable_tasks(model: MultiTaskModel, experiment: Experiment) -> dict[str, Task]:
    """The model's tasks for which the data set has labels. Raises ConfigError where there is none or the classes differ."""
    described = dataset_options(experiment.data)
    tasks = {name: task for name, task in model.tasks.items() if name in described}
    if not tasks:
        raise ConfigError(
            f"the data set has labels for {', '.join(described)}, the model predicts {', '.join(model.tasks)}: nothing to measure"
        )
    for name, task in tasks.items():
        own, found = task.options().get("classes"), described[name].get("classes")
        if found is not None and list(own) not in (list(found), numbered_classes(len(found))):
            raise ConfigError(
                f"the classes of '{name}' differ: the model has {len(own)} ({', '.join(own[:3])}, …), the data set "
                f"{len(found)} ({', '.join(found[:3])}, …); measure on the data the model was trained for"
            )
    return tasks
