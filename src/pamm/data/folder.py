"""A data set of one's own: folders of images and label files, no code.

<root>/dataset.yaml                      optional; see `Description`
<root>/<split>/images/<id>.jpg           or .png, .webp, ...; <split> is train or val
<root>/<split>/<task>/<id>.png           or .npy for depth; any subset of the images, for any subset of the tasks

With `data.val_fraction`, the validation split is a part of train's images, chosen only by their ids.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

from pamm.config.strict_yaml import read_yaml
from pamm.data.files import FileDataset, check_tasks, reading, root_of
from pamm.data.listing import (
    check_all_read,
    composed,
    conversion,
    is_folder,
    list_folder,
    names_in,
    near_name,
    preview,
)
from pamm.data.sample import DataError, Sample, register_dataset
from pamm.files import shown
from pamm.images import IMAGE_SUFFIXES, image_orientation, image_size, read_image
from pamm.tasks import TASKS, Task, create_task

if TYPE_CHECKING:
    from pamm.config.experiment import DataConfig

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

    def __init__(self, root: Path, split: str, tasks: Mapping[str, Task], val_fraction: float = 0.0):
        self.root, self.split, self.tasks = root, split, tasks
        divided = val_fraction > 0 and split in _SPLITS
        self.folder = root / ("train" if divided else split)
        images = list_folder(self.folder / "images", IMAGE_SUFFIXES)
        check_all_read(images, "images", IMAGE_SUFFIXES, conversion(images.unread))
        if not images.files:
            raise _no_images(root, self.folder, split)
        self._images = images.files
        self._companions = {"images": images.companions}
        """Folder → names of notes and the like in it, which are not read."""
        self._labels = {name: self._list_labels(name) for name in tasks}
        self.stored = len(self._images), self.labelled()
        if divided:
            self._keep(
                {image_id for image_id in self._images if (position(image_id) < val_fraction) == (split == "val")},
                val_fraction,
            )
        self.ids = list(self._images)

    def _keep(self, ids: set[str], val_fraction: float) -> None:
        """Keep only these images and their labels. Raises DataError if none remains."""
        if self._images and not ids:
            places = [math.floor(1000 * position(image_id)) for image_id in self._images]
            bound = (
                f"at least {(min(places) + 1) / 1000:g}" if self.split == "val" else f"at most {max(places) / 1000:g}"
            )
            raise DataError(
                f"data.val_fraction is {val_fraction:g}, which leaves no image to {self.split} of the {len(places)} in "
                f"{self.folder / 'images'}. Set --data.val-fraction to {bound}, or make {self.root / 'val'} by hand."
            )
        self._images = {image_id: path for image_id, path in self._images.items() if image_id in ids}
        self._labels = {
            name: {image_id: path for image_id, path in files.items() if image_id in ids}
            for name, files in self._labels.items()
        }

    @classmethod
    def options(cls, config: DataConfig) -> dict[str, dict[str, Any]]:
        """Options of the tasks in dataset.yaml, or of the folders that are named like a task."""
        root = _root(config)
        tasks = _describe(root).tasks
        for name, options in tasks.items():
            if "weight" in options:
                raise DataError(
                    f"{root / 'dataset.yaml'} gives task '{shown(name)}' a weight, which belongs to the experiment, not to the "
                    f"data: remove it there and set --tasks.{name}.weight {shown(options['weight'])} in training."
                )
            try:
                task = create_task(name, **options)
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{root}: task '{shown(name)}' cannot be built with the options {shown(options)}: {shown(error, 300)}"
                ) from None
            if "classes" in task.options() and options.get("classes") is None:
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
        _check_division(root, config.val_fraction)
        dataset = cls(root, split, tasks, config.val_fraction)
        folder = dataset.folder / "images"
        images, labelled = dataset.stored
        _at_least(images, description.splits.get(dataset.folder.name, 0), f"{folder}: images", root)
        for name, count in labelled.items():
            stated = description.labelled.get(dataset.folder.name, {}).get(name, 0)
            _at_least(count, stated, f"{dataset.folder / name}: labels", root)
            if split == "train" and not dataset.labelled()[name]:
                raise _no_label(dataset.folder, name, tasks)
        return dataset

    def image_path(self, index: int) -> Path:
        return self._images[self.ids[index]]

    def labelled(self) -> dict[str, int]:
        return {name: len(files) for name, files in self._labels.items()}

    def with_label(self, task: str) -> list[int]:
        return [index for index, image_id in enumerate(self.ids) if image_id in self._labels[task]]

    def label(self, index: int, task: str) -> Tensor:
        with reading():
            return self.tasks[task].read(self._labels[task][self.ids[index]])

    def turned_unseen(self, index: int) -> bool:
        path = self.image_path(index)
        with reading():
            orientation = image_orientation(path)
            height, width = image_size(path) if orientation > 4 else (1, 1)
        return orientation > 1 and height == width

    def notes(self) -> list[str]:
        found = []
        if self.folder.name != self.split:
            found.append(
                f"a part of the {self.stored[0]} images of {self.folder}, chosen by their names (data.val_fraction)"
            )
        elif stray := _unused_folders(self.folder, _describe(self.root).tasks, described=_check_name(self.root)):
            found.append(stray)
        for folder, names in self._companions.items():
            what = "pictures" if folder == "images" else "labels"
            if names:
                found.append(f"in {self.folder / folder}, not read, since they are no {what}: {preview(names)}")
        return found

    def problems(self) -> list[str]:
        paths = [path for files in self._labels.values() for path in files.values()]
        empty = [path for path in paths if os.path.isfile(path) and os.path.getsize(path) == 0]
        return [f"{path} is empty (0 bytes). Write it again, or remove it." for path in empty]

    def __getitem__(self, index: int) -> Sample:
        image_id, path = self.ids[index], self.image_path(index)
        files = {name: files[image_id] for name, files in self._labels.items() if image_id in files}
        with reading():
            image = read_image(path)
            labels = {name: self.tasks[name].read(file) for name, file in files.items()}
            if any(tuple(label.shape[-2:]) != image.shape[:2] for label in labels.values()):
                image = self._unturned(path, image, labels, files)
        return Sample(image_id, torch.from_numpy(image).permute(2, 0, 1), labels, image.shape[:2])

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
        suffixes = self.tasks[task].suffixes
        remedy = "They keep their values exactly: export the labels again so"
        listing = list_folder(self.folder / task, suffixes)
        notes = [name for name in listing.companions if composed(Path(name).stem) in self._images]
        listing = replace(listing, unread=(*listing.unread, *notes))  # annotations of other tools, one for each image
        check_all_read(listing, f"labels of '{task}'", suffixes, remedy)
        self._companions[task] = listing.companions
        strays = [image_id for image_id in listing.files if image_id not in self._images]
        if strays:
            raise DataError(
                f"{len(strays)} of the labels in {listing.folder} have no image of the same name in {self.folder / 'images'}: "
                f"{preview(listing.files[image_id].name for image_id in strays)}. Add the images or remove the labels."
                f"{near_name(strays[0], self._images)}"
            )
        return listing.files


def position(image_id: str) -> float:
    """Place of an image in [0, 1), only from its id: those below `data.val_fraction` are the validation split.

    The first 8 bytes of the SHA-256 of the id in UTF-8, over 2^64: the same on every machine, whatever else is there.
    """
    return int.from_bytes(hashlib.sha256(image_id.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


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
    otherwise = f", or leave the task out with --tasks {others}" if others else ""
    present = preview(name for name in names_in(folder) if is_folder(folder / name))
    return DataError(
        f"no image in {folder} has a label for task '{task}': {folder / task} holds none. Folders there: {present}. Put "
        f"the labels into {folder / task}, or rename the folder that holds them to '{task}'{otherwise}."
    )


def _no_images(root: Path, folder: Path, split: str) -> DataError:
    present = preview(name for name in names_in(root) if is_folder(root / name / "images")) or "none"
    divide = "; or split a part of train off with --data.val-fraction 0.1" if split == "val" else ""
    if is_folder(folder / "images"):
        return DataError(
            f"no image in {folder / 'images'}. Put files ending in {', '.join(IMAGE_SUFFIXES)} there{divide}."
        )
    inside = preview(names_in(folder))
    holds = f" {folder} holds {inside}." if inside else ""
    return DataError(
        f"no folder {folder / 'images'}: the {split} split's images belong there{divide}. Splits found: {present}.{holds}"
    )


def _check_division(root: Path, val_fraction: float) -> None:
    """Raise DataError if validation images would come from two places."""
    filled = [name for name in names_in(root / "val") if names_in(root / "val" / name)] if val_fraction > 0 else []
    if filled:
        raise DataError(
            f"data.val_fraction is {val_fraction:g}, which makes the validation split of train's images, but "
            f"{root / 'val' / filled[0]} holds files too. Set --data.val-fraction 0, or move {root / 'val'} elsewhere."
        )


def _unused_folders(folder: Path, tasks: Mapping[str, Any], *, described: bool) -> str:
    """A note on what lies beside images/ and is no label folder of the tasks, "" where there is nothing.

    described: whether dataset.yaml names the tasks, else the folders do.
    """
    others = [name for name in names_in(folder) if name != "images" and name not in tasks]
    if not others:
        return ""
    unlisted = [name for name in others if name in TASKS]
    near = [(name, match) for name in others for match in get_close_matches(name.lower(), TASKS, n=1)]
    hint = ""
    if unlisted:
        hint = f". To have labels read, list {preview(unlisted)} among the tasks there"
    elif near:
        hint = f". Did you mean to call '{shown(near[0][0])}' '{near[0][1]}'?"
    reason = "dataset.yaml lists no such task" if described else "no task has such a name"
    return f"in {folder}, not read, since {reason}: {preview(others)}{hint}"


_NAMED_LIKE = re.compile(r"dataset[ _-]?\.ya?ml(\.txt|\.ya?ml)?|dataset\.txt", re.IGNORECASE)

_MEANT = re.compile(r"dataset(\.ya?ml.*|\.json|\.toml)?", re.IGNORECASE)
"""Names of files that were probably meant as the description, such as copies and backups."""


def _check_name(root: Path) -> bool:
    """Whether dataset.yaml is there. Raises DataError for a file that somebody meant to be it."""
    names = names_in(root)
    there = "dataset.yaml" in names
    like = [name for name in names if _NAMED_LIKE.fullmatch(name) and name != "dataset.yaml"]
    if not there:
        like += [name for name in names if name.lower().endswith((".yaml", ".yml", ".yaml.txt", ".yml.txt"))]
        like += [name for name in names if _MEANT.fullmatch(name)]
    if like:
        remedy = "Remove it, or dataset.yaml" if there else "Rename it to dataset.yaml"
        raise DataError(
            f"{root} holds {shown(like[0])}, which is not read: the description is called dataset.yaml. {remedy}."
        )
    return there


def _describe(root: Path) -> Description:
    """dataset.yaml, or a description derived from the folder names. Raises DataError."""
    path = root / "dataset.yaml"
    if not _check_name(root):
        folders = {name for split in _SPLITS for name in names_in(root / split)}
        tasks: dict[str, dict[str, Any]] = {name: {} for name in TASKS if name in folders}
        if not tasks:
            raise DataError(
                f"{root} has no dataset.yaml, and no folder in {root}/train or {root}/val is named like a task "
                f"({', '.join(sorted(TASKS))}). Put the labels into such folders, beside images/."
            )
        return Description(tasks)
    try:
        content = read_yaml(path)
    except (OSError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} is not a readable YAML file: {shown(reason, 300)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict) or not content["tasks"]:
        raise DataError(
            f"{path} has no mapping 'tasks' that names one, e.g. 'tasks: {{semseg: {{classes: [sky, tree]}}, depth: {{}}}}'"
        )
    _check_keys(path, content)
    _check_counted(path, content)
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
            raise DataError(f"{path}: unknown key '{shown(key)}'.{hint} Known keys: {', '.join(known)}")
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
        raise DataError(f"{path}: splits and labelled must give whole numbers, found {shown(counts)}")


def _check_counted(path: Path, content: dict[str, Any]) -> None:
    """Raise DataError for numbers of splits and tasks that do not exist: they could not be compared with anything."""
    splits = {*_SPLITS, *names_in(path.parent)}
    labelled = content.get("labelled") or {}
    places = [(key, name, splits) for key in ("splits", "labelled") for name in content.get(key) or {}]
    places += [
        (f"labelled: {split}", name, content["tasks"]) for split, counts in labelled.items() for name in counts or {}
    ]
    for key, name, known in places:
        if name not in known:
            what = "split" if known is splits else "task"
            listed = ", ".join(_SPLITS if known is splits else map(str, known))
            raise DataError(f"{path}: '{key}' counts the {what} '{shown(name)}', which there is not; expected {listed}")
