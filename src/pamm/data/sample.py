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
from pamm.config.strict import check_choice
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

    Args:
        id: name of the image within its split.
        image: (3, H, W) uint8 RGB as read, (3, H, W) float32 normalised after the transforms.
        labels: task name → (c, H, W); tasks without a label for this image have no key.
        size: (H, W) of the image as read.
        box: place of the image in its evaluation frame; only from `EvalTransform`.
        original: the labels at `size`; only from `EvalTransform`.
    """

    id: str
    image: Tensor
    labels: dict[str, Tensor]
    size: tuple[int, int]
    box: Box | None = None
    original: dict[str, Tensor] | None = None


@dataclass
class Batch:
    """Samples of one size, stacked.

    Args:
        ids: ids of the samples.
        image: (B, 3, H, W) float32, normalised.
        labels: task name → (B, c, *label_size) for every task; a missing label has every pixel ignored.
        sizes: `size` of every sample.
        boxes: `box` of every sample.
        originals: `original` of every sample.
    """

    ids: list[str]
    image: Tensor
    labels: dict[str, Tensor]
    sizes: list[tuple[int, int]]
    boxes: list[Box | None]
    originals: list[dict[str, Tensor] | None]

    @property
    def label_size(self) -> tuple[int, int]:
        """Height and width of the labels, to which the network's output is resized; mostly the image's."""
        height, width = next(iter(self.labels.values()), self.image).shape[-2:]
        return height, width

    def to(self, device: torch.device) -> Batch:
        """Move image and labels to a device.

        Args:
            device: the device.

        Returns:
            A new batch.
        """
        labels = {name: label.to(device, non_blocking=True) for name, label in self.labels.items()}
        return replace(self, image=self.image.to(device, non_blocking=True), labels=labels)

    def pin_memory(self) -> Batch:
        """Copy image and labels to page-locked memory. Torch's loader calls this if the device is CUDA.

        Returns:
            A new batch.
        """
        labels = {name: label.pin_memory() for name, label in self.labels.items()}
        return replace(self, image=self.image.pin_memory(), labels=labels)


def collate(samples: Sequence[Sample], tasks: Mapping[str, Task]) -> Batch:
    """Stack transformed samples of one size.

    Args:
        samples: the samples.
        tasks: tasks of the batch; a missing label becomes an all-ignored one.

    Returns:
        The batch.
    """
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
    """Class decorator that makes a data set available under its `name`.

    Args:
        dataset: the data set's class.

    Returns:
        The same class.
    """
    DATASETS[dataset.name] = dataset
    return dataset


def dataset_class(config: DataConfig) -> type[Dataset]:
    """The class of the configured data set.

    Args:
        config: the data set's settings.

    Returns:
        The registered class.

    Raises:
        ConfigError: no data set of this name is registered.
    """
    return DATASETS[check_choice("data.name", config.name, sorted(DATASETS))]


class Dataset(ABC, torch.utils.data.Dataset):
    """One split of a data set: reads samples, transforms nothing.

    `tasks` holds the tasks asked for, in the order asked for; a sample's labels are a subset of them.
    """

    name: ClassVar[str]
    label_sizes: ClassVar[str] = "labels as stored"
    """The treatment of labels whose file has another size than the image, in words."""
    split: str
    tasks: Mapping[str, Task]
    ids: Sequence[str]

    @classmethod
    @abstractmethod
    def options(cls, config: DataConfig) -> dict[str, dict[str, Any]]:
        """Arguments of `create_task` that the data set determines (its classes, its unit).

        Args:
            config: the data set's settings.

        Returns:
            Task name → arguments, for every task that this data set can label.

        Raises:
            DataError: the description of the data set cannot be read.
        """

    @classmethod
    @abstractmethod
    def open(cls, config: DataConfig, split: str, tasks: Mapping[str, Task]) -> Dataset:
        """Open a split.

        Args:
            config: the data set's settings.
            split: "train", "val" or another split of the data set.
            tasks: tasks whose labels are read.

        Returns:
            The split.

        Raises:
            DataError: a folder, file or label is missing or wrong.
        """

    def __len__(self) -> int:
        return len(self.ids)

    def absent(self) -> list[int]:
        """Samples that must still be made; reading one makes it.

        Returns:
            Their indices.
        """
        return []

    def prepare(self, progress: bool = True, workers: int = 0) -> None:
        """Make every sample that is not made yet.

        Args:
            progress: show a bar on the standard error.
            workers: processes that make samples; 0 for this one.
        """

    def image_path(self, index: int) -> Path | None:
        """The file of an image.

        Args:
            index: 0 to len(self) − 1.

        Returns:
            The path; None if the image is not a file.
        """
        return None

    def labelled(self) -> dict[str, int]:
        """Count the labels of each task without reading them.

        Returns:
            Task name → number of images with its label.
        """
        return dict.fromkeys(self.tasks, len(self) - len(self.absent()))

    def with_label(self, task: str) -> Sequence[int]:
        """Find the samples that have a task's label.

        Args:
            task: name of the task.

        Returns:
            Their indices.
        """
        return range(len(self))

    def label(self, index: int, task: str) -> Tensor:
        """Read the label of an image that has one (see `with_label`).

        Args:
            index: 0 to len(self) − 1.
            task: name of the task.

        Returns:
            (c, H, W) label as stored.

        Raises:
            DataError: the label cannot be read.
        """
        return self[index].labels[task]

    def turned_unseen(self, index: int) -> bool:
        """Whether the EXIF orientation turns or mirrors the image without changing its size.

        In this case the sizes cannot show whether a label was drawn on the image as shown (which is assumed) or as stored.

        Args:
            index: 0 to len(self) − 1.

        Returns:
            True for such an image.
        """
        return False

    def notes(self) -> list[str]:
        """Notes on the split's files that are no mistakes, without reading the files.

        Returns:
            Sentences.
        """
        return []

    def problems(self) -> list[str]:
        """Mistakes in the split's files that are visible without reading them.

        Returns:
            Sentences.
        """
        return []

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Read a sample as stored.

        Args:
            index: 0 to len(self) − 1.

        Returns:
            The sample: uint8 image, and labels of the image's size.

        Raises:
            DataError: a file cannot be read.
        """
