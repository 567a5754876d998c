"""NYUD-v2 in the packaging of the multi-task benchmarks (NYUDv2.tar.gz, ATRC 2021).

NYUDv2/gt_sets/{train,val}.txt      795 and 654 ids
NYUDv2/images/<id>.png              RGB, 425 x 560
NYUDv2/segmentation/<id>.png        0 unlabelled, 1..40
NYUDv2/depth/<id>.npy               metres, 0 unknown
NYUDv2/normals/<id>.png             8-bit RGB, n = 2·v/255 - 1
NYUDv2/edge/<id>.png                0 or 255
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pamm.data.files import PackagedDataset, check_tasks, decode_normals, nearest, package_root, plane
from pamm.data.sample import DataError, register_dataset
from pamm.images import read_values
from pamm.tasks import Task
from pamm.tasks.depth import Depth, read_array
from pamm.tasks.pictures import read_mask

if TYPE_CHECKING:
    from pamm.config.experiment import DataConfig

CLASSES = (
    "wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain dresser "
    "pillow mirror floor_mat clothes ceiling books refridgerator television paper towel shower_curtain box whiteboard "
    "person night_stand toilet sink lamp bathtub bag otherstructure otherfurniture otherprop"
)
"""The 40 classes in the order of their indices, in the data set's own spelling."""

_FILES = {
    "semseg": ("segmentation", ".png"),
    "depth": ("depth", ".npy"),
    "normals": ("normals", ".png"),
    "edge": ("edge", ".png"),
}


@register_dataset
class NYUD(PackagedDataset):
    """NYUD-v2: semseg (40 classes), depth in metres, normals, edge; every image has every label."""

    name = "nyud"
    folder = "NYUDv2"
    lists = "gt_sets"
    images = ("images", ".png")
    published = MappingProxyType({"train": 795, "val": 654})

    @classmethod
    def options(cls, config: DataConfig) -> dict[str, dict[str, Any]]:
        classes = [name.replace("_", " ") for name in CLASSES.split()]
        return {
            "semseg": {"classes": classes},
            "depth": {},
            "normals": {},
            "edge": {"max_distance": 0.011, "outline": True},
        }

    @classmethod
    def open(cls, config: DataConfig, split: str, tasks: Mapping[str, Task]) -> NYUD:
        """Raises DataError for absent or incomplete data, and for the other packagings of NYUD-v2."""
        check_tasks(tasks, _FILES, "NYUD-v2")
        dataset = cls(package_root(config, cls.folder, cls.lists, "NYUDv2.tar.gz"), split, tasks)
        for name in tasks:
            dataset.require(*_FILES[name])
        return dataset

    def check_packaging(self) -> None:
        first = self.ids[0]
        if first in self.files("images", ".jpg") and first not in self.files("images", ".png"):
            raise DataError(
                f"{self.root} is another packaging of NYUD-v2 (NYUD_MT.tgz, with {first}.jpg and .npy edges and "
                "normals), whose images and sizes differ. Use NYUDv2.tar.gz, with images/<id>.png."
            )

    def read_label(self, name: str, image_id: str, size: tuple[int, int]) -> Tensor:
        label = _READERS[name](self.path_of(image_id, *_FILES[name]), size)
        task = self.tasks[name]
        return task.without_far(label) if isinstance(task, Depth) else label


def _read_semseg(path: Path, size: tuple[int, int]) -> Tensor:
    """0 (unlabelled) → 255, 1..40 → 0..39: subtracting 1 from an unsigned byte does both."""
    return torch.from_numpy(nearest(plane(read_values(path), path, 40) - np.uint8(1), size))[None]


def _read_edge(path: Path, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(nearest(read_mask(path), size))[None]


def _read_normals(path: Path, size: tuple[int, int]) -> Tensor:
    return decode_normals(read_values(path), size, path)


def _read_depth(path: Path, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(nearest(read_array(path, remedy="unpack it again"), size))[None]


_READERS = {"semseg": _read_semseg, "depth": _read_depth, "normals": _read_normals, "edge": _read_edge}
