"""A data set of one's own: folders of images and label files, no code.

<root>/dataset.yaml                      optional; see `Description`
<root>/<split>/images/<id>.jpg           or .png, .webp, ...; <split> is train or val
<root>/<split>/<task>/<id>.png           or .npy for depth; any subset of the images, for any subset of the tasks
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

from pamm.data.files import FileDataset, check_tasks, files_by_stem, is_folder, names_in, preview, reading, root_of
from pamm.data.sample import DataError, Sample, register_dataset
from pamm.images import IMAGE_SUFFIXES, read_image
from pamm.strict_yaml import load_yaml
from pamm.tasks import TASKS, Task, create_task

if TYPE_CHECKING:
    from pamm.experiment import DataConfig

_SPLITS = ("train", "val")


@dataclass(frozen=True)
class Description:
    """The content of dataset.yaml.

    tasks: task name → options of the task, e.g. `semseg: {classes: [sky, tree]}`, `depth: {unit: millimetre}`.
    splits: split → number of images; labelled: split → task → number of labels. Both are lower bounds: fewer files on
    disk mean that the data set was not copied whole, and are an error.
    """

    tasks: dict[str, dict[str, Any]]
    splits: dict[str, int] = field(default_factory=dict)
    labelled: dict[str, dict[str, int]] = field(default_factory=dict)
    description: str = ""


@register_dataset
class FolderDataset(FileDataset):
    """One split of a folder data set (see the module).

    A label has the size of its image as a viewer shows it, that is, turned by its EXIF orientation; where the labels
    have the size of the stored, unturned image instead, the image is left unturned.
    """

    name = "folder"

    def __init__(self, root: Path, split: str, tasks: Mapping[str, Task]):
        self.root, self.split, self.tasks = root, split, tasks
        self._images = files_by_stem(root / split / "images", IMAGE_SUFFIXES)
        self._labels = {name: self._list_labels(name) for name in tasks}
        self.ids = list(self._images)

    @classmethod
    def options(cls, config: DataConfig) -> dict[str, dict[str, Any]]:
        """Options of the tasks in dataset.yaml, or of the folders that are named like a task."""
        root = _root(config)
        tasks = _describe(root).tasks
        for name, options in tasks.items():
            if "weight" in options:
                raise DataError(
                    f"{root / 'dataset.yaml'} gives task '{name}' a weight, which belongs to the experiment, not to the "
                    f"data: remove it there and set --tasks.{name}.weight {options['weight']} in training."
                )
            try:
                task = create_task(name, **options)
            except (TypeError, ValueError) as error:
                raise DataError(f"{root}: task '{name}' cannot be built with the options {options}: {error}") from None
            if "classes" in task.options() and "classes" not in options:
                raise DataError(
                    f"{root}: the class names of '{name}' are not known. List them, in the order of their indices, in "
                    f"{root / 'dataset.yaml'}, e.g. 'tasks: {{{name}: {{classes: [sky, tree, road]}}}}'."
                )
        return tasks

    @classmethod
    def open(cls, config: DataConfig, split: str, tasks: Mapping[str, Task]) -> FolderDataset:
        """Raises DataError for a missing folder, labels without images, and fewer files than dataset.yaml states.

        Every task needs a label in the training split; the validation split may lack some.
        """
        root = _root(config)
        description = _describe(root)
        check_tasks(tasks, description.tasks, root)
        folder = root / split / "images"
        if not is_folder(folder):
            present = preview(name for name in names_in(root) if is_folder(root / name / "images")) or "none"
            raise DataError(f"no folder {folder}: the {split} split's images belong there. Splits found: {present}")
        dataset = cls(root, split, tasks)
        if not dataset.ids:
            raise DataError(f"no image in {folder}. Put files ending in {', '.join(IMAGE_SUFFIXES)} there.")
        _at_least(len(dataset), description.splits.get(split, 0), f"{folder}: images", root)
        for name, count in dataset.labelled().items():
            stated = description.labelled.get(split, {}).get(name, 0)
            _at_least(count, stated, f"{root / split / name}: labels", root)
            if split == "train" and not count:
                raise _no_label(root / split, name, tasks)
        return dataset

    def image_path(self, index: int) -> Path:
        return self._images[self.ids[index]]

    def labelled(self) -> dict[str, int]:
        return {name: len(files) for name, files in self._labels.items()}

    def __getitem__(self, index: int) -> Sample:
        id, path = self.ids[index], self.image_path(index)
        files = {name: files[id] for name, files in self._labels.items() if id in files}
        with reading():
            image = read_image(path)
            labels = {name: self.tasks[name].read(file) for name, file in files.items()}
            if any(tuple(label.shape[-2:]) != image.shape[:2] for label in labels.values()):
                image = self._unturned(path, image, labels, files)
        return Sample(id, torch.from_numpy(image).permute(2, 0, 1), labels, image.shape[:2])

    @staticmethod
    def _unturned(path: Path, image: np.ndarray, labels: Mapping[str, Tensor], files: Mapping[str, Path]) -> np.ndarray:
        """The image as stored, if that is what all labels fit. Raises DataError naming both sizes."""
        stored = read_image(path, exif=False)
        for name, label in labels.items():
            if tuple(label.shape[-2:]) != stored.shape[:2]:
                raise DataError(
                    f"{files[name]} is {label.shape[-2]} x {label.shape[-1]} (height x width), its image {path} is "
                    f"{image.shape[0]} x {image.shape[1]}. Resize the label (nearest neighbour) or restore the image."
                )
        return stored

    def _list_labels(self, task: str) -> dict[str, Path]:
        folder = self.root / self.split / task
        suffixes = self.tasks[task].suffixes
        others = [
            n for n in names_in(folder) if n[0] != "." and Path(n).suffix.lower() in _FOREIGN.difference(suffixes)
        ]
        if others:
            raise DataError(
                f"{folder} holds {preview(others)}: labels of '{task}' must be {' or '.join(suffixes)} files, which keep "
                "their values exactly. Export them again so, or move these files elsewhere."
            )
        files = files_by_stem(folder, suffixes)
        strays = [path.name for id, path in files.items() if id not in self._images]
        if strays:
            raise DataError(
                f"{len(strays)} labels in {folder} have no image of the same name in "
                f"{self.root / self.split / 'images'}: {preview(strays)}. Add the images or remove the labels."
            )
        return files


_FOREIGN = frozenset((*IMAGE_SUFFIXES, ".npy", ".npz"))
"""Suffixes of files that somebody meant to be labels, whether or not the task reads them."""


def _root(config: DataConfig) -> Path:
    return root_of(config, "train/images/, val/images/ and the label folders beside them")


def _at_least(found: int, stated: int, what: str, root: Path) -> None:
    if found < stated:
        raise DataError(
            f"{what}: found {found} files, {root / 'dataset.yaml'} states {stated}. Copy the data set again, or "
            "correct the number there."
        )


def _no_label(folder: Path, task: str, tasks: Iterable[str]) -> DataError:
    others = ",".join(name for name in tasks if name != task)
    remedy = f", or leave the task out with --tasks {others}" if others else ""
    present = preview(name for name in names_in(folder) if is_folder(folder / name))
    return DataError(
        f"no image in {folder} has a label for task '{task}': {folder / task} holds none. Folders there: {present}. Put "
        f"the labels into {folder / task}, rename the folder that holds them to '{task}'{remedy}."
    )


def _describe(root: Path) -> Description:
    """dataset.yaml, or what the folder names tell. Raises DataError."""
    path = root / "dataset.yaml"
    if path.name not in names_in(root):
        folders = {name for split in _SPLITS for name in names_in(root / split)}
        tasks: dict[str, dict[str, Any]] = {name: {} for name in TASKS if name in folders}
        if not tasks:
            raise DataError(
                f"{root} has no dataset.yaml, and no folder in {root}/train or {root}/val is named like a task "
                f"({', '.join(sorted(TASKS))}). Put the labels into such folders, beside images/."
            )
        return Description(tasks)
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} is not a readable YAML file: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        raise DataError(
            f"{path} has no mapping 'tasks', e.g. 'tasks: {{semseg: {{classes: [sky, tree]}}, depth: {{}}}}'"
        )
    _check_keys(path, content)
    filled = {key: _filled(value) for key, value in content.items() if key in _NESTED}
    return Description(**{**content, **filled})


_NESTED = ("tasks", "splits", "labelled")


def _filled(mapping: Mapping[Any, Any] | None) -> dict[str, Any]:
    """A mapping with text for keys; one left empty in YAML, which is null there, is an empty one, and so are those in it."""
    return {str(key): {} if value is None else value for key, value in (mapping or {}).items()}


def _check_keys(path: Path, content: dict[str, Any]) -> None:
    known = list(Description.__dataclass_fields__)
    for key in content:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise DataError(f"{path}: unknown key '{key}'.{hint} Known keys: {', '.join(known)}")
    nested = [content.get(key) for key in _NESTED]
    nested += [
        value for key in ("tasks", "labelled") if isinstance(content.get(key), dict) for value in content[key].values()
    ]
    if not all(value is None or isinstance(value, dict) for value in nested):
        raise DataError(
            f"{path}: tasks, their options, splits and labelled must be mappings, e.g. 'splits: {{train: 90}}'"
        )
    counts = [*(content.get("splits") or {}).values()]
    counts += [count for split in (content.get("labelled") or {}).values() for count in (split or {}).values()]
    if not all(type(count) is int for count in counts):
        raise DataError(f"{path}: splits and labelled must give whole numbers, found {counts}")
