"""The unit of data: one image with the labels it has, and a batch of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pamm import PammError
from pamm.tasks import Task

if TYPE_CHECKING:
    from pamm.config.experiment import DataConfig

DATASETS: dict[str, type[Dataset]] = {}
"""Every registered data set, by name."""

SomeDataset = TypeVar("SomeDataset", bound="Dataset")


Box = tuple[int, int, int, int]
"""top, left, height, width, in pixels."""


@dataclass
class Sample:
    """One image and its labels.

    image: (3, H, W) uint8 RGB as read, (3, H, W) float32 normalised after the transforms.
    labels: task name → (c, H, W); a task without a label for this image has no key.
    size: (H, W) of the image as read.
    box: where the image lies in its evaluation frame. original: the labels at `size`. Both where `EvalTransform` set them.
    """

    id: str
    image: Tensor
    labels: dict[str, Tensor]
    size: tuple[int, int]
    box: Box | None = None
    original: dict[str, Tensor] | None = None


@dataclass
class Batch:
    """image (B, 3, H, W) float32; labels: task name → (B, c, *label_size) for every task, all ignored where one is missing.

    sizes, boxes, originals: `size`, `box` and `original` of every sample.
    """

    ids: list[str]
    image: Tensor
    labels: dict[str, Tensor]
    sizes: list[tuple[int, int]]
    boxes: list[Box | None]
    originals: list[dict[str, Tensor] | None]

    @property
    def label_size(self) -> tuple[int, int]:
        """Height and width of the labels, which the network's output is brought to; mostly the image's."""
        height, width = next(iter(self.labels.values()), self.image).shape[-2:]
        return height, width

    def to(self, device: torch.device) -> Batch:
        """The same batch with image and labels on `device`."""
        labels = {name: label.to(device, non_blocking=True) for name, label in self.labels.items()}
        return replace(self, image=self.image.to(device, non_blocking=True), labels=labels)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by torch's loader where the device is CUDA)."""
        labels = {name: label.pin_memory() for name, label in self.labels.items()}
        return replace(self, image=self.image.pin_memory(), labels=labels)


def collate(samples: Sequence[Sample], tasks: Mapping[str, Task]) -> Batch:
    """Stack transformed samples of one size; missing labels become all-ignored ones."""
    height, width = next((label for s in samples for label in s.labels.values()), samples[0].image).shape[-2:]
    labels = {
        name: torch.stack([s.labels[name] if name in s.labels else task.missing((height, width)) for s in samples])
        for name, task in tasks.items()
    }
    return Batch(
        [s.id for s in samples],
        torch.stack([s.image for s in samples]),
        labels,
        sizes=[s.size for s in samples],
        boxes=[s.box for s in samples],
        originals=[s.original for s in samples],
    )


class DataError(PammError, ValueError):
    """Data that is absent, incomplete or corrupt; the message names the file, what was expected and the remedy."""


def register_dataset(dataset: type[SomeDataset]) -> type[SomeDataset]:
    """Class decorator: makes a data set available under its `name`."""
    DATASETS[dataset.name] = dataset
    return dataset


class Dataset(ABC, torch.utils.data.Dataset):
    """One split of a data set: reads samples, transforms nothing.

    `tasks` holds the tasks asked for, in the order asked for; a sample's labels are a subset of them.
    """

    name: ClassVar[str]
    label_sizes: ClassVar[str] = "labels as stored"
    """What was done to labels whose file has another size than the image, in words."""
    split: str
    tasks: Mapping[str, Task]
    ids: Sequence[str]

    @classmethod
    @abstractmethod
    def options(cls, config: DataConfig) -> dict[str, dict[str, Any]]:
        """Task name → arguments of `create_task` (its classes, its unit), for every task this data set can label."""

    @classmethod
    @abstractmethod
    def open(cls, config: DataConfig, split: str, tasks: Mapping[str, Task]) -> Dataset:
        """The split ("train" or "val") with labels for `tasks`. Raises DataError where something is absent."""

    def __len__(self) -> int:
        return len(self.ids)

    def absent(self) -> list[int]:
        """Indices of the samples that are not made yet, which asking for them does."""
        return []

    def prepare(self, progress: bool = True, workers: int = 0) -> None:
        """Make the samples that are absent. Files that are there need nothing."""

    def image_path(self, index: int) -> Path | None:
        """File of image number `index`, where it is one."""
        return None

    def labelled(self) -> dict[str, int]:
        """Task name → number of images that have its label, without reading them."""
        return dict.fromkeys(self.tasks, len(self) - len(self.absent()))

    def with_label(self, task: str) -> Sequence[int]:
        """Indices of the samples that have the task's label."""
        return range(len(self))

    def label(self, index: int, task: str) -> Tensor:
        """The label of image number `index` for a task, which it has (see `with_label`). Raises DataError."""
        return self[index].labels[task]

    def turned_unseen(self, index: int) -> bool:
        """Whether the image is shown turned or mirrored (by its EXIF orientation) at the very size it is stored at.

        Then no size tells whether a label was drawn on the image as shown, as this package takes it, or as stored.
        """
        return False

    def notes(self) -> list[str]:
        """What is worth knowing about the split's files and no mistake, without reading them."""
        return []

    def problems(self) -> list[str]:
        """What is wrong with files, as far as it is seen without reading them."""
        return []

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Sample number `index` as read from disk: uint8 image, labels of the image's size. Raises DataError."""
