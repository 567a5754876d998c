"""The images to show, from files or from a data set with their truths, and the models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from pamm.build import label_options
from pamm.config.experiment import Experiment
from pamm.config.strict import ConfigError
from pamm.data import open_dataset
from pamm.data.sample import Sample
from pamm.drawing.sheet import Subject
from pamm.evaluation.evaluate import measurable_tasks, saved_experiment
from pamm.files import shown
from pamm.kernels import Choice
from pamm.look import LookError
from pamm.models.backbone import NoBackbone
from pamm.models.model import MultiTaskModel
from pamm.prediction import Predictor, file_names, list_inputs, to_array
from pamm.tasks import Task, create_task


class Subjects(Sequence[Subject]):
    """Subjects that are read when asked for; `names` are known before."""

    def __init__(self, names: Sequence[str], load: Callable[[int], Subject]):
        self.names = list(names)
        self._load = load

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Subject:
        return self._load(range(len(self))[index])


def from_files(patterns: Sequence[str | Path]) -> Subjects:
    """Files, folders and globs of images → subjects without truths.

    Raises PredictError, LookError where they hold files that are not read, and ImageError when an image is read.
    """
    inputs = list_inputs(patterns)
    if inputs.unread:
        path, reason = inputs.failures()[0]
        raise LookError(
            f"{len(inputs.unread)} of the files given are not read, e.g. {shown(path, 300)}: {reason}; or name the images, e.g. "
            "'photos/*.jpg'"
        )
    paths = inputs.images
    names = file_names(paths)
    return Subjects(names, lambda index: Subject(names[index], to_array(paths[index])))


def from_dataset(
    experiment: Experiment, tasks: Mapping[str, Task], *, split: str = "val", ids: Sequence[str] = (), count: int = 4
) -> Subjects:
    """Samples of a data set as read, with truths of `tasks`: those of `ids`, or `count` spread evenly over the split.

    Raises LookError for an unknown id, DataError.
    """
    described = label_options(experiment)
    readers = {name: create_task(name, **described[name]) for name in tasks if name in described}
    data = open_dataset(experiment.data, split, readers)
    known = {image_id: index for index, image_id in enumerate(data.ids)}
    for image_id in ids:
        if image_id not in known:
            near = ", ".join(get_close_matches(image_id, known, 3, 0.3) or list(known)[:3])
            raise LookError(f"no image '{image_id}' among the {len(known)} of the {split} split; for example: {near}")
    spread = np.linspace(0, len(known) - 1, min(count, len(known))).astype(int).tolist()
    chosen = [known[image_id] for image_id in ids] or spread
    return Subjects([data.ids[i] for i in chosen], lambda index: _with_truths(data[chosen[index]], readers))


def _with_truths(sample: Sample, readers: Mapping[str, Task]) -> Subject:
    truths, valid = {}, {}
    for name, label in sample.labels.items():
        known = readers[name].valid(label)[0].numpy()
        if known.any():
            values = readers[name].truth(label).numpy()
            truths[name] = np.where(
                known.reshape(known.shape + (1,) * (values.ndim - 2)), values, np.zeros_like(values)
            )
            valid[name] = known
    return Subject(sample.id, to_array(sample.image), truths, valid, {name: readers[name] for name in truths})


def subjects_for(
    models: Mapping[str, MultiTaskModel],
    sources: Sequence[str],
    *,
    images: Sequence[str | Path] = (),
    data: str | None = None,
    root: str | None = None,
    split: str = "val",
    ids: Sequence[str] = (),
    count: int = 4,
) -> Subjects:
    """The images given, or samples of the data set named, by default the first model's own.

    data: recipe or experiment.yaml; root, split, ids, count: see `from_dataset`. Raises LookError, ConfigError, DataError,
    PredictError, ImageError.
    """
    if images:
        if data is not None or root is not None or ids:
            raise LookError(
                "--images and a data set (--data, --data.root, --ids) exclude one another: give one of the two"
            )
        return from_files(images)
    try:
        experiment = saved_experiment(sources[0], data, root)
    except ConfigError as error:
        if data is not None or Path(sources[0]).expanduser().joinpath("experiment.yaml").is_file():
            raise
        raise LookError(f"{error}; or give photographs: --images photo.jpg") from None
    tasks: dict[str, Task] = {}
    for model in models.values():
        tasks |= measurable_tasks(model, experiment)
    return from_dataset(experiment, tasks, split=split, ids=ids, count=count)


def open_models(
    sources: Sequence[str],
    *,
    names: Sequence[str] = (),
    device: str = "auto",
    longest_side: int | None = None,
    kernels: Choice = "auto",
) -> dict[str, Predictor]:
    """Name → predictor of each source (see `pamm.load_model`); by default a folder is named by its last part.

    Raises LookError for names that do not fit, and for a network without a backbone; what `Predictor` raises.
    """
    if names and (len(names) != len(sources) or len(set(names)) != len(names)):
        raise LookError(f"--names: found {len(names)} ({', '.join(names)}), expected {len(sources)} different ones")
    short = [os.path.basename(os.path.normpath(source)) for source in sources]
    own = short if len(set(short)) == len(short) else list(sources)
    if len(set(own)) != len(own):
        raise LookError(f"the model {next(name for name in own if own.count(name) > 1)} is given twice; give it once")
    models = {}
    for name, source in zip(names or own, sources, strict=True):
        models[name] = Predictor(source, device=device, longest_side=longest_side, kernels=kernels)
        if isinstance(models[name].model.backbone, NoBackbone):
            raise LookError(
                f"{source} has no backbone and takes no image; import a checkpoint that holds the backbone's weights"
            )
    return models


def choose_tasks(models: Mapping[str, Predictor], chosen: Sequence[str] | None) -> list[str]:
    """The tasks of all models in their order, or those chosen, in the order chosen. Raises LookError."""
    known = list(dict.fromkeys(task for model in models.values() for task in model.tasks))
    for task in chosen or ():
        if task not in known:
            raise LookError(f"--tasks: '{task}' is none of these models' tasks: {', '.join(known)}")
    tasks = list(dict.fromkeys(chosen)) if chosen else known
    for task in tasks:
        classes = [model.tasks[task].options().get("classes") for model in models.values() if task in model.tasks]
        if any(other != classes[0] for other in classes):
            raise LookError(
                f"the models have different classes for '{task}', so that one colour would mean two things; leave it out with "
                "--tasks, or look at one model at a time"
            )
    return tasks
