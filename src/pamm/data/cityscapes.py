"""Cityscapes with disparity (leftImg8bit, gtFine and disparity archives), as MTMamba reads it.

leftImg8bit/{train,val}/<city>/<id>_leftImg8bit.png     RGB, 1024 x 2048; 2975 and 500 images
gtFine/{train,val}/<city>/<id>_gtFine_labelIds.png      0..33, of which 19 classes are evaluated
disparity/{train,val}/<city>/<id>_disparity.png         16-bit, 256·d + 1, 0 unknown

Depth is disparity, pixels. Two kinds of pixels have the value 0 here, which the depth task ignores in loss and metric: unknown
disparity, which the published code sets to -1 and trains on, and the sky, which it sets to 0 and trains on as well. Its metric
leaves both out, as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pamm.data.files import PackagedDataset, check_tasks, nearest, package_root, plane
from pamm.data.listing import files_ending, names_in, preview
from pamm.data.sample import DataError, register_dataset
from pamm.images import read_values
from pamm.tasks import Task
from pamm.tasks.depth import Depth

if TYPE_CHECKING:
    from pamm.config.experiment import DataConfig

# fmt: off
CLASSES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light", 20: "traffic sign",
    21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}
# fmt: on
"""Label id → class, in the order of the class indices."""

SKY = 23
"""Label id of the sky. The published code masks 10, the sky's class index: it compares the converted labels, not the files' ids."""

LAST_ID = 33
"""The largest label id."""

LIMIT = 80.0
"""Disparity, pixels; the published metric leaves out pixels of this value and more."""

_LABEL_IDS = ("gtFine", "_gtFine_labelIds.png")
_FILES = {"semseg": (*_LABEL_IDS,), "depth": ("disparity", "_disparity.png")}


@register_dataset
class Cityscapes(PackagedDataset):
    """Cityscapes: semseg (19 classes) and depth (disparity, pixels); every image has both."""

    name = "cityscapes"
    folder = "cityscapes_all"
    lists = "leftImg8bit"
    images = ("leftImg8bit", "_leftImg8bit.png")
    published = MappingProxyType({"train": 2975, "val": 500})

    @classmethod
    def options(cls, config: DataConfig) -> dict[str, dict[str, Any]]:
        return {"semseg": {"classes": list(CLASSES.values())}, "depth": {"unit": "disparity", "limit": LIMIT}}

    @classmethod
    def open(cls, config: DataConfig, split: str, tasks: Mapping[str, Task]) -> Cityscapes:
        """Raises DataError for absent or incomplete data."""
        check_tasks(tasks, _FILES, "Cityscapes")
        archives = "leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip and disparity_trainvaltest.zip"
        dataset = cls(package_root(config, cls.folder, cls.lists, archives), split, tasks)
        for name in tasks:
            dataset.require(*_FILES[name])
            dataset.require(*_LABEL_IDS)  # depth needs them too, for the sky
        return dataset

    @property
    def source(self) -> str:
        return f"{self.lists}/{self.split}"

    def list_ids(self) -> list[str]:
        """<city>/<city>_<sequence>_<frame> of every image, sorted."""
        ids = sorted(self.files(*self.images))
        if not ids:
            raise DataError(
                f"{self.root / self.source} holds no <city>/*{self.images[1]}. Unpack the archive there again."
            )
        return ids

    def list_files(self, folder: str, suffix: str) -> dict[str, Path]:
        root = self.root / folder / self.split
        return {
            f"{city}/{image_id}": path
            for city in names_in(root)
            for image_id, path in files_ending(root / city, suffix).items()
        }

    def notes(self) -> list[str]:
        root = self.root / self.source
        listed = {path.relative_to(root).as_posix() for path in self.files(*self.images).values()}
        names = [f"{city}/{name}" for city in names_in(root) for name in names_in(root / city) or [""]]
        others = [name.rstrip("/") for name in names if name not in listed]
        told = (
            f"not read, since {'their names do' if len(others) > 1 else 'its name does'} not end in {self.images[1]}: "
        )
        return super().notes() + ([f"in {root}, {told}{preview(others)}"] if others else [])

    def read_label(self, name: str, image_id: str, size: tuple[int, int]) -> Tensor:
        path = self.path_of(image_id, *_LABEL_IDS)
        label_ids = nearest(read_label_ids(path), size)
        if name == "semseg":
            return torch.from_numpy(_INDEX[label_ids])[None]
        disparity = nearest(read_disparity(self.path_of(image_id, *_FILES["depth"])), size)
        label = torch.from_numpy(np.where(label_ids == SKY, np.float32(0), disparity))[None]
        depth = self.tasks[name]
        assert isinstance(depth, Depth)
        return depth.without_far(label)


def read_label_ids(path: Path) -> np.ndarray:
    """(H, W) uint8 label ids. Raises DataError, also for the train ids 0 to 18 and 255, which mean other classes."""
    values = plane(read_values(path), path, 255)
    if values.max() > LAST_ID:
        raise DataError(
            f"{path} holds the value {values.max()}, expected label ids, 0 to {LAST_ID}; train ids, 0 to 18 and 255, are another "
            "encoding. Unpack gtFine again."
        )
    return values


def read_disparity(path: Path) -> np.ndarray:
    """16-bit PNG of 256·d + 1 → (H, W) float32 disparity d, pixels, 0 where unknown. Raises DataError."""
    values = read_values(path)
    if values.ndim != 2 or values.dtype.kind not in "iu" or values.dtype == np.uint8:
        raise DataError(
            f"{path} holds {values.dtype} values of shape {values.shape}, expected a 16-bit grey PNG. Unpack it again."
        )
    return (np.maximum(values.astype(np.float32) - 1, 0) / 256).astype(np.float32)


def _indices() -> np.ndarray:
    """(256,) label id → class index, 255 for ids that are not evaluated."""
    table = np.full(256, 255, np.uint8)
    table[list(CLASSES)] = np.arange(len(CLASSES))
    return table


_INDEX = _indices()
