"""A run: its folder is created or resumed, and everything that its loop needs is built."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pamm.build import check_options, create_tasks
from pamm.config.experiment import Experiment, ModelConfig, check, check_batch, dump, load
from pamm.config.strict import ConfigError, to_dict
from pamm.data import Batch, Dataset, open_dataset
from pamm.data.inspect import notes_before_training
from pamm.data.loader import train_loader
from pamm.data.transforms import TrainTransform
from pamm.evaluation.evaluate import Evaluation
from pamm.files import first_line, replace_text, shown
from pamm.kernels import Choice, apply_choice
from pamm.models.formats import CONFIG_FILE
from pamm.models.model import MultiTaskModel
from pamm.models.registry import build_model
from pamm.models.saved import RESTORE, CheckpointError, load_model
from pamm.runtime.distributed import launch
from pamm.tasks import Task, create_task
from pamm.training.checkpoint import holds_files, load_training, recover
from pamm.training.initial import freeze, take_weights
from pamm.training.lock import FolderInUseError, FolderLock
from pamm.training.loop import Loop, tell
from pamm.training.optimizer import create_optimizer

if TYPE_CHECKING:
    from lightning_fabric import Fabric

FREE_KEYS = (
    "data.root",
    *(
        f"train.{key}"
        for key in (
            "workers",
            "save_every",
            "save_minutes",
            "log_every",
            "eval_every",
            "device",
            "devices",
            "nodes",
            "grad_checkpointing",
        )
    ),
)
"""Leaves that may change when a run resumes: the weights of last/ do not depend on them.

(`eval_every` decides which weights best/ gets; `devices` enters where `accumulate` splits a share for batch normalisation.)
"""


def train(experiment: Experiment, out: Path, *, progress: bool = True, kernels: Choice = "auto") -> Evaluation:
    """Train into a run folder, or resume the run in it.

    A SIGTERM saves and raises SystemExit(143). A SIGINT (Ctrl-C) saves and raises KeyboardInterrupt.

    Args:
        experiment: the experiment.
        out: the run folder.
        progress: show a bar on the standard error.
        kernels: "auto" trains with faster modules in the place of the network's own (see `pamm.accelerate`), "off" without.

    Returns:
        The evaluation of the best weights.

    Raises:
        ConfigError: the experiment cannot be used, or differs from the run's.
        DataError: the data set cannot be read.
        CheckpointError: the weights of `train.init` or of the run cannot be loaded.
        TrainingError: training cannot go on, e.g. for lack of memory.
        FolderInUseError: another process trains into the folder.
    """
    loop, loader = create_loop(experiment, out, progress=progress, kernels=kernels)
    return loop.run(loader)


def create_loop(
    experiment: Experiment, out: Path, *, progress: bool = False, kernels: Choice = "auto"
) -> tuple[Loop, Iterable[list[Batch]]]:
    """Everything a run needs, at the step where it starts or goes on, and the batches of its remaining steps.

    The run folder is this process's until `Loop.close`.
    """
    check(experiment)
    check_options(experiment)
    fabric = launch(experiment.train)
    check_batch(experiment.train, fabric.world_size)
    lock = lock_folder(fabric, out)
    try:
        return _create_loop(fabric, experiment, out, lock, progress, kernels)
    except BaseException:
        if lock:
            lock.release()
        raise


def _create_loop(
    fabric: Fabric, experiment: Experiment, out: Path, lock: FolderLock | None, progress: bool, kernels: Choice
) -> tuple[Loop, Iterable[list[Batch]]]:
    check_source(experiment.train.init, out)
    experiment = with_recorded_source(experiment, out)
    start_folder(fabric, experiment, out)
    config, resumes = experiment.train, holds_files(out / "last")
    tasks = create_tasks(experiment)
    if resumes:
        check_tasks(out, tasks)
    data = open_dataset(experiment.data, "train", tasks)
    validation = open_dataset(experiment.data, "val", tasks)  # an error now if there is none, not after hours
    tell_unmeasured(fabric, validation, tasks)
    for note in () if resumes else notes_before_training((data, validation)):
        tell(fabric, f"note: {note}")
    network = create_network(fabric, experiment, tasks, out, resumes=resumes, kernels=kernels)
    model, optimizer = fabric.setup(network, create_optimizer(network, config))
    state = {"step": 0, "evaluated": 0, "best": math.inf, "best_step": 0, "images": len(data)}
    if resumes:
        state = load_training(out / "last", network, optimizer, state)
        if state["images"] != len(data):
            tell(
                fabric,
                f"the training split had {state['images']} images when {out / 'last'} was saved and has {len(data)} now: the run "
                "goes on with other batches than one that was not stopped",
            )
            state["images"] = len(data)
        if state["step"] > config.steps:
            raise CheckpointError(
                f"{out / 'last'} holds step {state['step']}, but train.steps is {config.steps}: choose another folder with --out"
            )
    place = {"rank": fabric.global_rank, "world": fabric.world_size, "start_step": state["step"]}
    loader = train_loader(data, TrainTransform(tasks, experiment.data, config.seed), config, **place)
    parts = {"progress": progress, "lock": lock}
    return Loop(fabric, experiment, out, network, model, optimizer, tasks, state, **parts), loader


def lock_folder(fabric: Fabric, out: Path) -> FolderLock | None:
    """The run folder's lock, on one of the processes. Raises FolderInUseError on all."""
    lock, objection = None, None
    if fabric.is_global_zero:
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock = FolderLock(out)
        except FolderInUseError as error:
            objection = str(error)
    objection = fabric.broadcast(objection)
    if objection:
        raise FolderInUseError(objection)
    return lock


def with_recorded_source(experiment: Experiment, out: Path) -> Experiment:
    """A resumed run keeps the `train.init` that it was started with; its weights are in the run folder."""
    path = out / "experiment.yaml"
    if experiment.train.init is not None or not (path.exists() and holds_files(out / "last")):
        return experiment
    return replace(experiment, train=replace(experiment.train, init=load(path).train.init))


def create_network(
    fabric: Fabric, experiment: Experiment, tasks: Mapping[str, Task], out: Path, *, resumes: bool, kernels: Choice
) -> MultiTaskModel:
    """The network as it starts: from random weights, its backbone's pretrained ones, or those of `train.init`.

    Pretrained weights that others replace are not fetched.
    """
    config, model = experiment.train, experiment.model
    untrained = replace(model, backbone=replace(model.backbone, pretrained=False))

    def build(wanted: ModelConfig) -> MultiTaskModel:
        torch.manual_seed(config.seed)
        return build_model(wanted, tasks, experiment.data.size)

    if resumes or config.init is None:
        network = build(untrained if resumes else model)
    else:
        source = load_model(config.init)
        network = build(untrained)
        fit = take_weights(network, source, config.init)
        if model.backbone.pretrained and any(name.startswith("backbone.") for name in fit.incomplete()):
            network = build(model)
            fit = take_weights(network, source, config.init)
        tell(fabric, str(fit))
        if fabric.is_global_zero:
            replace_text(out / "init.txt", f"{fit}\n")
    if config.freeze and config.init is None and not (model.backbone.pretrained or resumes):
        tell(fabric, "train.freeze without --init or pretrained weights: frozen layers keep their random weights")
    network.settings["model"] = to_dict(model)
    freeze(network, config.freeze)
    network.set_grad_checkpointing(config.grad_checkpointing)
    apply_choice(network, kernels, training=True)
    if config.compile:
        network.compile(dynamic=False)
    return network


def check_source(source: str | None, out: Path) -> None:
    """Raise ConfigError if fine-tuning would start from the run folder itself."""
    if source is None:
        return
    path, folder = (Path(os.path.realpath(Path(place).expanduser())) for place in (source, out))
    if path == folder or folder in path.parents:
        raise ConfigError(
            f"train.init: {source} is in the run folder {out} itself. Choose another folder for the new run with --out; to go on "
            "with the old one, leave --init out"
        )


def check_tasks(out: Path, tasks: Mapping[str, Task]) -> None:
    """Raise ConfigError where the tasks' options (classes and their order, unit, …) are others than those of the saved weights."""
    path = out / "last" / CONFIG_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        saved = {name: create_task(name, **options).options() for name, options in saved.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({shown(first_line(error))}). {RESTORE}") from error
    here, there = (json.loads(json.dumps(o)) for o in ({n: t.options() for n, t in tasks.items()}, saved))
    different = [
        f"tasks.{name}.{key}: {_both(there.get(name, {}).get(key), own.get(key))}"
        for name, own in here.items()
        for key in sorted(own.keys() | there.get(name, {}).keys())
        if own.get(key) != there.get(name, {}).get(key)
    ]
    different += [f"task {name}: only there" for name in there.keys() - here.keys()]
    if different or list(here) != list(there):
        raise ConfigError(
            f"{out} holds another experiment ({'; '.join(different[:4]) or 'the tasks have another order'}): its data set was "
            "described otherwise when these weights were saved. Restore the description, or choose another folder with --out "
            f"(--init {out} starts there from these weights, class by class)"
        )


def _both(there: Any, here: Any) -> str:
    """Two different values; of two long lists the first place where they part."""
    if isinstance(there, list) and isinstance(here, list) and max(len(there), len(here)) > 12:
        if len(there) != len(here):
            return f"{len(there)} there, {len(here)} here"
        number = next(i for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
        return f"number {number} is {shown(there[number])} there, {shown(here[number])} here"
    words = [shown(", ".join(map(str, v)) if isinstance(v, list) else v, 200) for v in (there, here)]
    return f"{words[0]} there, {words[1]} here"


def tell_unmeasured(fabric: Fabric, data: Dataset, tasks: Mapping[str, Task]) -> None:
    """Print which tasks the validation split cannot measure, and the consequence for best/."""
    counts = data.labelled()
    absent = [name for name in tasks if not counts.get(name, 0)]
    if not absent or data.absent():  # rooms that are not made yet have all labels
        return
    weighed = [name for name, task in tasks.items() if task.weight > 0 and name not in absent]
    chosen = f"is chosen by {', '.join(weighed)}" if weighed else "will hold the latest weights, not the best"
    tell(fabric, f"the validation split has no label of {', '.join(absent)}: not measured, and best/ {chosen}")


def start_folder(fabric: Fabric, experiment: Experiment, out: Path) -> None:
    """Create the run folder with its experiment.yaml, or check that the run in it is this one.

    Raises ConfigError, and CheckpointError where starting anew would replace weights that nothing else holds.
    """
    path = out / "experiment.yaml"
    if fabric.is_global_zero:
        for left in out.glob(".pamm-*.new"):  # of a process killed while it wrote a file
            left.unlink(missing_ok=True)
        recover(out / "last")
        recover(out / "best")
    fabric.barrier()
    if path.exists() and ((out / "results.json").exists() or any(holds_files(out / name) for name in ("last", "best"))):
        different = differences(path, experiment)
        if different:
            raise ConfigError(
                f"{out} holds another experiment ({'; '.join(different[:4])}). Choose another folder with --out, or remove this one"
            )
    if holds_files(out / "best") and not holds_files(out / "last"):
        raise CheckpointError(
            f"{out / 'best'} holds weights, but {out / 'last'}, from which the run would go on, is gone: a new start would replace "
            f"them. Restore last/ from a copy, train into another folder (--out; --init {out} starts there from these weights), or "
            "remove best/ to start anew here"
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
