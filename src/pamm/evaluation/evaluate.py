"""Every task's metrics and validation loss over a split, the same number for any number of processes and any batch size."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from pamm.build import label_options
from pamm.config.experiment import DataConfig, Experiment, load
from pamm.config.recipes import named_experiment
from pamm.config.strict import ConfigError
from pamm.data import Batch, Dataset, open_dataset
from pamm.data.listing import preview
from pamm.data.loader import eval_loader
from pamm.data.transforms import EvalTransform, denormalize, seen
from pamm.drawing.colours import data_uri, draw_pair, fit, scale_bar
from pamm.evaluation.ranking import Ranking
from pamm.evaluation.scores import RESOLUTIONS, ImageResult, Resolution, Row, TaskScores, significant, summed
from pamm.files import replace_text
from pamm.kernels import Choice
from pamm.kernels.prepare import prepare
from pamm.models.model import MultiTaskModel
from pamm.models.registry import rebuild_model
from pamm.models.saved import find_checkpoint, load_model
from pamm.runtime.precision import NAMES, choose_precision
from pamm.tasks import Task, create_task
from pamm.tasks.segmentation import numbered_classes

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Draw = Callable[[Task, ImageResult], Mapping[str, str]]
"""Makes the pictures of an image for one task: name → data URI."""

TILE = 288
"""Longest side of the pictures kept of the best and worst images, pixels."""


SCALE = "scale"
"""Name of the picture that is a bar of colours, not a map."""


@dataclass(frozen=True)
class Evaluation:
    """Results, and the data and the protocol that they were measured with."""

    row: Row
    """Task → metric → value in the padded frame, as the papers measure; empty if this was not requested."""
    images: int
    """Number of images."""
    protocol: str
    """Split, number of images, frame and treatment of padding, in words."""
    model: dict[str, Any] = field(default_factory=dict)
    """Source of the weights."""
    split: str = "val"
    """Name of the split."""
    original: OriginalResults | None = None
    """Results at every image's own size, if requested."""
    rankings: Mapping[str, Ranking] = field(default_factory=dict)
    """Task → its best and worst images."""
    gain: Mapping[str, Any] = field(default_factory=dict)
    """Gain over a baseline, see `pamm.evaluation.gain.Comparison.summary`."""
    data: str = ""
    """Kind of the data set."""
    boundaries: str = ""
    """Protocol of the boundary benchmark; empty if boundaries were not measured."""

    @property
    def rows(self) -> dict[Resolution, Row]:
        """Resolution → results, of those that were measured."""
        found: dict[Resolution, Row] = {"frame": self.row} if self.row else {}
        if self.original:
            found["original"] = self.original.row
        return found

    def protocol_at(self, resolution: Resolution) -> str:
        """The protocol of the results at a resolution.

        Args:
            resolution: "frame" or "original".

        Returns:
            Split, number of images, size and treatment of padding, in words.
        """
        return self.original.protocol if resolution == "original" and self.original else self.protocol

    def total_loss(self, tasks: Mapping[str, Task]) -> float:
        """Sum of weight · validation loss over the tasks of weight above 0 that have labels.

        Args:
            tasks: task name → task.

        Returns:
            The sum; infinity if no task has labels.
        """
        losses = {task: self.row[name]["loss"] for name, task in tasks.items() if task.weight > 0}
        labelled = [task.weight * loss for task, loss in losses.items() if not math.isnan(loss)]
        return sum(labelled) if labelled else math.inf

    def content(self) -> dict[str, Any]:
        """The results as JSON values, as `save` writes them.

        Returns:
            Nested dictionaries; a value that is not finite is None.
        """
        content = {"data": self.data, "split": self.split, "images": self.images, "model": self.model}
        if self.row:
            content |= {"resolution": "frame", "protocol": self.protocol, "results": _finite(self.row)}
        if self.original:
            own = {"split": self.split, "images": self.images, "resolution": "original"}
            own |= {"protocol": self.original.protocol, "resized": self.original.resized}
            content["original"] = own | {"results": _finite(self.original.row)}
        if self.rankings:
            content["images_by_score"] = {task: _listed(ranking) for task, ranking in self.rankings.items()}
        return content | ({"gain": dict(self.gain)} if self.gain else {})

    def save(self, path: Path) -> None:
        """Write the results as JSON, completely or not at all.

        Args:
            path: the file, which is replaced.
        """
        replace_text(path, json.dumps(self.content(), indent=1) + "\n")


@dataclass(frozen=True)
class OriginalResults:
    """Results at every image's own size."""

    row: Row
    protocol: str
    resized: int
    """Number of images whose size in the frame is not their own; with 0, both resolutions give the same numbers."""


def _finite(row: Row) -> dict[str, dict[str, float | None]]:
    return {t: {k: v if math.isfinite(v) else None for k, v in metrics.items()} for t, metrics in row.items()}


def _listed(ranking: Ranking) -> dict[str, Any]:
    lists = {"worst": ranking.worst, "best": ranking.best}
    return {"score": ranking.score} | {
        name: [{"id": image.id, "score": image.score} for image in images] for name, images in lists.items()
    }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    tasks: Mapping[str, Task],
    *,
    device: torch.device | str = "cpu",
    resolutions: Sequence[Resolution] = ("frame",),
    rankings: Mapping[str, Ranking] | None = None,
    draw: Draw | None = None,
    quick: bool = False,
    progress: bool = False,
) -> tuple[dict[Resolution, Row], int]:
    """Evaluate a network on this process's share of the images; the results cover the shares of all processes.

    On a CPU a batch runs image by image. This costs no time there, and the arithmetic of an image does not depend on the other
    images. Values are rounded to 6 significant digits, because the order of float32 sums affects those below.

    Args:
        model: the network, on `device`.
        loader: batches of this process's share. Resolution "original" needs an `EvalTransform` with `original` on.
        tasks: task name → task to measure.
        device: device of the network.
        resolutions: "frame", "original" or both.
        rankings: task → ranking that its images enter.
        draw: makes the pictures of an image that a ranking keeps.
        quick: use quick substitutes for metrics that take long (see `Task.quick_metric`).
        progress: show a bar on the standard error.

    Returns:
        Resolution → task → metric → value; and the number of images whose size in the frame is not their own.
    """
    device = torch.device(device)
    home = device if device.type != "mps" else torch.device("cpu")  # sums are float64, which MPS lacks
    scores = {name: TaskScores(task, resolutions, device=home, quick=quick) for name, task in tasks.items()}
    resized = 0
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not progress):
            for result in predict_batch(model, batch, device):
                resized += result.resized
                for name in tasks:
                    scores[name].update(result)
                for name, ranking in (rankings or {}).items():
                    _rank(ranking, tasks[name], result, draw, home)
        values = {name: scores[name].compute() for name in tasks}
        for ranking in (rankings or {}).values():
            ranking.gather()
        rows: dict[Resolution, Row] = {
            resolution: {name: values[name][resolution] for name in tasks} for resolution in resolutions
        }
        return rows, int(summed(torch.tensor(resized, device=home)))
    finally:
        model.train(was_training)


def predict_batch(model: nn.Module, batch: Batch, device: torch.device) -> Iterator[ImageResult]:
    """Run a batch, image by image on a CPU, and yield its images separately."""
    step = 1 if device.type == "cpu" else len(batch.ids)
    for start in range(0, len(batch.ids), step):
        logits = model(batch.image[start : start + step].to(device), batch.label_size)
        for index in range(start, min(start + step, len(batch.ids))):
            yield ImageResult(
                batch.ids[index],
                batch.image[index],
                {name: label[index : index + 1].to(device) for name, label in batch.labels.items()},
                {name: x[index - start : index - start + 1] for name, x in logits.items()},
                batch.sizes[index],
                batch.boxes[index],
                batch.originals[index],
            )


def _rank(ranking: Ranking, task: Task, result: ImageResult, draw: Draw | None, device: torch.device) -> None:
    logits, label = (maps[task.name].to(device) for maps in (result.logits, result.labels))
    score = significant(task.score_image(logits, label))
    if math.isfinite(score):
        ranking.add(result.id, score, (lambda: draw(task, result)) if draw else dict)


def draw_result(task: Task, result: ImageResult, config: DataConfig) -> dict[str, str]:
    """The network's view of an image, its prediction and the truth, as data URIs of small pictures without the padding.

    If colours follow a range, prediction and truth share it, and a bar shows it.
    """

    def crop(picture: Any, box: tuple[int, int, int, int]) -> Any:
        top, left, height, width = box
        return picture[..., top : top + height, left : left + width]

    assert result.box is not None  # `EvalTransform` sets it
    box = result.box
    logits, label = (crop(maps[task.name][0], box) for maps in (result.logits, result.labels))
    pair = draw_pair(task, logits, label)
    seen_image = denormalize(crop(result.image, seen(box, config)))
    pictures = {"image": seen_image, "prediction": pair.prediction, "truth": pair.truth}
    shown = {
        name: data_uri(fit(picture, TILE), "png", "jpeg") for name, picture in pictures.items() if picture is not None
    }
    return shown | ({} if pair.scale is None else {SCALE: data_uri(scale_bar(task, pair.scale, TILE // 2))})


def evaluate_split(
    fabric: Fabric,
    model: nn.Module,
    experiment: Experiment,
    tasks: Mapping[str, Task],
    *,
    split: str = "val",
    batch_size: int = 8,
    resolutions: Sequence[Resolution] = ("frame",),
    ranked: int = 0,
    pictures: bool = False,
    quick: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a network on a split, sharded over the fabric's processes.

    Labels are read and measured as the data set and the experiment's options describe them (unit, boundary tolerance), which
    may differ from the model's.

    Args:
        fabric: the processes and the device.
        model: the network, on the fabric's device.
        experiment: its data set and its tasks' options are used.
        tasks: task name → task to measure.
        split: "train", "val" or another split of the data set.
        batch_size: images per batch; it does not change the results.
        resolutions: "frame", "original" or both.
        ranked: number of best and of worst images to find for each task.
        pictures: keep pictures of these images.
        quick: use quick substitutes for metrics that take long (see `Task.quick_metric`).
        progress: show a bar on the standard error.

    Returns:
        The results.

    Raises:
        DataError: the split or a label cannot be read.
        NonFiniteError: the network's output has NaN or infinite values.
    """
    config = experiment.data
    described = label_options(experiment)
    readers = {name: create_task(name, **described[name]) for name in tasks}
    measured = {name: create_task(name, **(task.options() | described[name])) for name, task in tasks.items()}
    data = open_dataset(config, split, readers)
    transform = EvalTransform(readers, config, original="original" in resolutions)
    shard = {"rank": fabric.global_rank, "world": fabric.world_size}
    loader = eval_loader(data, transform, batch_size=batch_size, workers=experiment.train.workers, **shard)
    rankings = {
        name: Ranking(ranked, score=task.image_score, higher_is_better=task.higher_is_better)
        for name, task in measured.items()
        if ranked
    }
    options = {"device": fabric.device, "resolutions": resolutions, "quick": quick, "progress": progress}
    draw = partial(draw_result, config=config) if pictures else None
    rows, resized = evaluate(model, loader, measured, rankings=rankings, draw=draw, **options)
    protocol, own = _protocols(config, split, data, resized, measured.get("edge"))
    original = OriginalResults(rows["original"], own, resized) if "original" in rows else None
    return Evaluation(
        rows.get("frame", {}),
        len(data),
        protocol,
        split=split,
        original=original,
        rankings=rankings,
        data=config.name,
        boundaries=measured["edge"].options()["protocol"] if "edge" in measured else "",
    )


def _protocols(config: DataConfig, split: str, data: Dataset, resized: int, edge: Task | None) -> tuple[str, str]:
    """The measurements in words: at the frame's resolution, and at the images' own size. edge: the task, if measured."""
    lines = ""
    if edge:
        lines = "; boundaries by '{protocol}', within {max_distance:g} of the diagonal".format(**edge.options())
    shrunk = "larger images shrunk to fit, " if config.fit else ""
    shrunk += f"seen at {config.size[0]}×{config.size[1]}, " if config.frame != config.size else ""
    frame = (
        f"{config.name} {split} split, {len(data)} images, frame {config.frame[0]}×{config.frame[1]} ({shrunk}centred"
    )
    return (
        f"{frame}, padding ignored), maps compared at the frame's resolution, single scale{lines}",
        f"{frame}), maps cropped to the image, brought to its own size (bilinear logits) and compared there with "
        f"{data.label_sizes}, single scale; {resized} of the images have another size in the frame{lines}",
    )


def evaluate_saved(
    source: str,
    fabric: Fabric,
    *,
    data: str | None = None,
    root: str | None = None,
    split: str = "val",
    batch_size: int = 8,
    workers: int = 2,
    resolutions: Sequence[Resolution] = RESOLUTIONS,
    ranked: int = 0,
    pictures: bool = False,
    untrained: bool = False,
    precision: str = "fp32",
    compile: bool = False,  # noqa: A002
    kernels: Choice = "auto",
) -> tuple[list[tuple[str, Evaluation]], dict[str, Task]]:
    """Evaluate a saved model.

    Args:
        source: anything that `pamm.load_model` takes.
        fabric: the processes and the device.
        data: recipe or experiment.yaml whose data set is measured; by default the run's own.
        root: folder of the data set; by default that of the experiment.
        split: "train", "val" or another split of the data set.
        batch_size: images per batch; it does not change the results.
        workers: processes that load data.
        resolutions: "frame", "original" or both.
        ranked: number of best and of worst images to find for each task.
        pictures: keep pictures of these images.
        untrained: also evaluate the same network with random weights.
        precision: see `pamm.Predictor`.
        compile: see `pamm.Predictor`.
        kernels: see `pamm.Predictor`.

    Returns:
        Named results, those of the untrained network first; and the tasks.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: the experiment of `data` cannot be used.
        DataError: the split or a label cannot be read.
    """
    model = load_model(source)
    experiment = saved_experiment(source, data, root)
    tasks = measurable_tasks(model, experiment)
    experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, workers=workers))
    progress = fabric.is_global_zero and sys.stderr.isatty()
    arguments = {"split": split, "batch_size": batch_size, "resolutions": resolutions, "progress": progress}
    form = {"precision": precision, "compile": compile, "kernels": kernels}
    results = []
    if untrained:
        torch.manual_seed(experiment.train.seed)
        blank = prepare(rebuild_model(model.settings).to(fabric.device), **form)
        results.append(("untrained", evaluate_split(fabric, blank, experiment, tasks, **arguments)))
    model = prepare(model.to(fabric.device), **form)
    result = evaluate_split(fabric, model, experiment, tasks, ranked=ranked, pictures=pictures, **arguments)
    weights = find_checkpoint(place).name if (place := Path(source).expanduser()).exists() else "hub"
    arithmetic = NAMES[choose_precision(precision, fabric.device)]
    details = {"source": source, "weights": weights.strip("."), "precision": arithmetic}
    return [*results, (Path(source).name or source, dataclasses.replace(result, model=details))], tasks


def saved_experiment(source: str, data: str | None, root: str | None) -> Experiment:
    """The experiment whose data a saved model is measured on: the one named by `data`, or the run's own."""
    if data is not None:
        experiment = named_experiment(data)
    else:
        folders = [Path(source).expanduser(), Path(source).expanduser().parent]
        found = next((f / "experiment.yaml" for f in folders if (f / "experiment.yaml").is_file()), None)
        if found is None:
            raise ConfigError(
                f"no experiment.yaml beside {source}: say on which data to measure, e.g. --data folder-pamm --data.root FOLDER"
            )
        experiment = load(found)
    if root is not None:
        experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, root=root))
    return experiment


def measurable_tasks(model: MultiTaskModel, experiment: Experiment) -> dict[str, Task]:
    """The model's tasks for which the data set has labels. Raises ConfigError where there is none or the classes differ."""
    described = label_options(experiment)
    tasks = {name: task for name, task in model.tasks.items() if name in described}
    if not tasks:
        raise ConfigError(
            f"the data set has labels for {', '.join(described)}, the model predicts {', '.join(model.tasks)}: nothing to measure"
        )
    for name, task in tasks.items():
        own, found = task.options().get("classes", ()), described[name].get("classes")
        if found is not None and list(own) not in (list(found), numbered_classes(len(found))):
            raise ConfigError(
                f"the classes of '{name}' differ: the model has {len(own)} ({preview(own)}), the data set {len(found)} "
                f"({preview(found)}); measure on the data the model was trained for"
            )
    return tasks
