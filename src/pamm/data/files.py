"""Common parts of data sets of files: finding and checking files."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pamm.data.listing import files_ending, is_folder, names_in, near_name, preview, read_ids
from pamm.data.sample import DataError, Dataset, Sample
from pamm.files import shown
from pamm.images import ImageError, image_size, read_image
from pamm.tasks import LabelError, Task
from pamm.tasks.task import nearest_index

if TYPE_CHECKING:
    from pamm.config.experiment import DataConfig


class FileDataset(Dataset):
    """A split of which every image is one file and every label is made from files."""

    @abstractmethod
    def image_path(self, index: int) -> Path:
        """File of image number `index`."""

    @abstractmethod
    def labelled(self) -> dict[str, int]:
        """Task name → number of images that have its label, without reading them."""


class PackagedDataset(FileDataset):
    """A split of a public data set in the packaging of the multi-task benchmarks, in which the split lists are trusted.

    A list may be shortened to work with a part of the data; every file of a listed image must exist.
    """

    label_sizes = (
        "labels as stored, those of another size than their image brought to it (nearest pixel, normals bicubic)"
    )
    folder: str
    """Folder that the archive unpacks to; `data.root` is it or holds it."""
    lists: str
    """Folder of train.txt and val.txt, one id per line."""
    images: tuple[str, str]
    """Folder and suffix of the images."""
    published: Mapping[str, int]
    """Split → number of ids as published."""
    added: Mapping[str, str] = MappingProxyType({})
    """Split that the archive holds no list of → where to take its list from."""

    def __init__(self, root: Path, split: str, tasks: Mapping[str, Task]):
        self.root, self.split, self.tasks = root, split, tasks
        self._files: dict[tuple[str, str], dict[str, Path]] = {}
        self.ids = self.list_ids()
        self.check_packaging()
        self.require(*self.images)

    @property
    def source(self) -> str:
        """The file of ids, relative to the root."""
        return f"{self.lists}/{self.split}.txt"

    def list_ids(self) -> list[str]:
        """The ids of the split. Raises DataError."""
        path = self.root / self.source
        if self.split not in self.published and path.name not in names_in(path.parent):
            remedy = self.added.get(self.split, "one id per line")
            raise DataError(
                f"no split list {path}: the archive holds those of {', '.join(self.published)}. Choose among them, or write "
                f"this list there: {remedy}."
            )
        return read_ids(path)

    def files(self, folder: str, suffix: str) -> dict[str, Path]:
        """Id → file, of those in `folder` (listed once) whose names end in `suffix`, in any letter case."""
        place = (folder, suffix)
        if place not in self._files:
            self._files[place] = self.list_files(*place)
        return self._files[place]

    def list_files(self, folder: str, suffix: str) -> dict[str, Path]:
        """See `files`."""
        return files_ending(self.root / folder, suffix)

    def path_of(self, image_id: str, *places: str) -> Path:
        """The file of an id in the first of the places that has one: folder, suffix, folder, suffix, ..."""
        pairs = list(zip(places[::2], places[1::2], strict=True))
        found = (self.files(*pair).get(image_id) for pair in pairs)
        return next((path for path in found if path), self.root / pairs[0][0] / f"{image_id}{pairs[0][1]}")

    def check_packaging(self) -> None:
        """Raise DataError for other packagings of the same images."""

    def require(self, *places: str) -> None:
        """Raise DataError unless every id has a file in one of the places: folder, suffix, folder, suffix, ..."""
        pairs = list(zip(places[::2], places[1::2], strict=True))
        found = {image_id for pair in pairs for image_id in self.files(*pair)}
        absent = [image_id for image_id in self.ids if image_id not in found]
        if absent:
            expected = " or ".join(f"{a}/{shown(absent[0])}{b}" for a, b in pairs)
            written = any(absent[0].lower().endswith(suffix) for _, suffix in pairs)
            hint = " Leave the suffixes out of the list." if written else near_name(absent[0], found)
            raise DataError(
                f"{self.root}: {len(absent)} of the {len(self.ids)} ids in {self.source} have no file, "
                f"e.g. {expected}. Unpack the whole archive again, or keep only the ids you have there.{hint}"
            )

    def image_path(self, index: int) -> Path:
        return self.path_of(self.ids[index], *self.images)

    def labelled(self) -> dict[str, int]:
        return {name: len(self.ids) for name in self.tasks}

    def label(self, index: int, task: str) -> Tensor:
        with reading():
            return self.read_label(task, self.ids[index], image_size(self.image_path(index)))

    def notes(self) -> list[str]:
        published = self.published.get(self.split, len(self))
        if published == len(self):
            return []
        return [
            f"{len(self)} images listed, {published} were published: scores of this split cannot be compared with papers"
        ]

    def __getitem__(self, index: int) -> Sample:
        image_id = self.ids[index]
        with reading():
            image = read_image(self.image_path(index), exif=False)
            size = image.shape[:2]
            labels = {name: self.read_label(name, image_id, size) for name in self.tasks}
        return Sample(image_id, torch.from_numpy(image).permute(2, 0, 1), labels, size)

    @abstractmethod
    def read_label(self, name: str, image_id: str, size: tuple[int, int]) -> Tensor:
        """The label of task `name`, resized to the image's `size` where its file has another."""


@contextmanager
def reading() -> Iterator[None]:
    """Context manager: errors of reading images and labels become DataErrors."""
    try:
        yield
    except (ImageError, LabelError) as error:
        raise DataError(str(error)) from None


def root_of(config: DataConfig, kind: str) -> Path:
    """The configured root folder. Raises DataError where none is set or it does not exist."""
    if config.root is None:
        raise DataError(f"data.root is not set: give the folder that holds {kind}, e.g. --data.root ~/data")
    root = Path(os.path.expanduser(config.root))
    if not is_folder(root):
        raise DataError(f"no folder {root}: data.root must name the folder that holds {kind}")
    return root


def package_root(config: DataConfig, folder: str, lists: str, archive: str) -> Path:
    """The folder that holds `lists`: data.root or `folder` in it. Raises DataError naming what is there instead."""
    root = root_of(config, f"{folder}/ (unpacked from {archive})")
    for candidate in (root, root / folder):
        if is_folder(candidate / lists):
            return candidate
    raise DataError(
        f"{root} holds neither {lists}/ nor {folder}/{lists}/, but {preview(names_in(root)) or 'nothing'}. "
        f"Unpack {archive} there, or set data.root to the folder that holds {folder}/."
    )


def check_tasks(tasks: Iterable[str], known: Iterable[str], where: object) -> None:
    """Raise DataError for a task that the data set has no label for."""
    known = list(known)
    for name in tasks:
        if name not in known:
            raise DataError(f"{where} has no labels for task '{name}'; it has: {', '.join(known)}. Choose among them.")


def nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, ...) → (H, W, ...) by nearest neighbour, source index ⌊i·h/H⌋."""
    rows, columns = (nearest_index(values.shape[i], size[i]) for i in (0, 1))
    return values if values.shape[:2] == size else values[rows[:, None], columns]


def decode_normals(values: np.ndarray, size: tuple[int, int], path: Path) -> Tensor:
    """(h, w, 3) 8-bit normals → (3, *size) float32, 2·v/255 - 1 (not made unit again), bicubic where sizes differ."""
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] < 3:
        raise DataError(
            f"{path} holds {values.dtype} values of shape {values.shape}, expected 8-bit RGB normals. Unpack it again."
        )
    normals = torch.from_numpy(values[..., :3].copy()).permute(2, 0, 1) * (2 / 255) - 1
    if values.shape[:2] == size:
        return normals
    return torch.nn.functional.interpolate(normals[None], size=size, mode="bicubic", align_corners=False)[0]


def plane(values: np.ndarray, path: Path, highest: int, *extra: int) -> np.ndarray:
    """Check a label picture: one channel, whole numbers up to `highest` or among `extra`. Raises DataError."""
    if values.ndim != 2:
        raise DataError(f"{path} has shape {values.shape}, expected one channel (H, W). Unpack it again.")
    wrong = (values > highest) & ~np.isin(values, extra)
    if wrong.any():
        also = "".join(f" or {value}" for value in extra)
        raise DataError(f"{path} holds the value {values[wrong][0]}, expected 0..{highest}{also}. Unpack it again.")
    return values.astype(np.uint8)
