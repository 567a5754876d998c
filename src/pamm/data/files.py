"""What data sets of files have in common: finding, listing and checking files."""

from __future__ import annotations

import os
import stat
import unicodedata
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pamm.data.sample import DataError, Dataset, Sample
from pamm.images import ImageError, read_image
from pamm.tasks import LabelError, Task
from pamm.tasks.task import nearest_index

if TYPE_CHECKING:
    from pamm.experiment import DataConfig


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
        self.ids = self.list_ids()
        self.check_packaging()
        self.require(*self.images)

    @property
    def source(self) -> str:
        """Where the ids come from, inside the root."""
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

    def files(self, folder: str, suffix: str) -> set[str]:
        """The ids that have a file in `folder`."""
        return {name.removesuffix(suffix) for name in names_in(self.root / folder) if name.endswith(suffix)}

    def check_packaging(self) -> None:
        """Raise DataError for other packagings of the same images."""

    def require(self, *places: str) -> None:
        """Raise DataError unless every id has a file in one of the places: folder, suffix, folder, suffix, ..."""
        found: set[str] = set()
        for folder, suffix in zip(places[::2], places[1::2], strict=True):
            found |= self.files(folder, suffix)
        absent = [id for id in self.ids if id not in found]
        if absent:
            expected = " or ".join(f"{a}/{absent[0]}{b}" for a, b in zip(places[::2], places[1::2], strict=True))
            raise DataError(
                f"{self.root}: {len(absent)} of the {len(self.ids)} ids in {self.source} have no file, "
                f"e.g. {expected}. Unpack the whole archive again, or keep only the ids you have there."
            )

    def image_path(self, index: int) -> Path:
        return self.root / self.images[0] / f"{self.ids[index]}{self.images[1]}"

    def labelled(self) -> dict[str, int]:
        return {name: len(self.ids) for name in self.tasks}

    def __getitem__(self, index: int) -> Sample:
        id = self.ids[index]
        with reading():
            image = read_image(self.image_path(index), exif=False)
            size = image.shape[:2]
            labels = {name: self.read_label(name, id, size) for name in self.tasks}
        return Sample(id, torch.from_numpy(image).permute(2, 0, 1), labels, size)

    @abstractmethod
    def read_label(self, name: str, id: str, size: tuple[int, int]) -> Tensor:
        """The label of task `name`, resized to the image's `size` where its file has another."""


@contextmanager
def reading() -> Iterator[None]:
    """Files that are no images or labels become one kind of error."""
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


def read_ids(path: Path) -> list[str]:
    """The ids of a split list, one per line. Raises DataError where the file is absent, empty or repeats an id."""
    try:
        ids = path.read_text().split()
    except FileNotFoundError:
        raise DataError(f"no split list {path}. Unpack the archive again: it holds the lists of its images.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable text file ({error}). Unpack the archive again.") from None
    if not ids:
        raise DataError(f"{path} lists no image. Unpack the archive again, or write one id per line.")
    if len(set(ids)) != len(ids):
        raise DataError(f"{path} lists {len(ids) - len(set(ids))} ids twice. Remove the repeated lines.")
    return ids


def files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Stem → file, sorted, of files with one of `suffixes`. Raises DataError where two files share a stem.

    Stems are in Unicode's composed form: systems write the same accent as one character or as two.
    """
    files: dict[str, Path] = {}
    for name in names_in(folder):
        path = folder / name
        if path.suffix.lower() in suffixes and not name.startswith("."):
            stem = unicodedata.normalize("NFC", path.stem)
            if stem in files:
                raise DataError(f"{folder} holds both {files[stem].name} and {name}. Keep one of the two files.")
            files[stem] = path
    return files


def preview(names: Iterable[str], count: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


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


def is_folder(path: Path) -> bool:
    """Whether a folder is there. Raises DataError where that cannot be told: a forbidden path, an over-long name."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def names_in(folder: Path) -> list[str]:
    """Sorted names in a folder; none where it is absent. Raises DataError where it may not be read."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from None


def _unreadable(path: Path, error: OSError | ValueError) -> DataError:
    if isinstance(error, PermissionError):
        return DataError(f"{path} may not be read: change its permissions, or those of the folders it lies in.")
    return DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}). Correct the path.")
