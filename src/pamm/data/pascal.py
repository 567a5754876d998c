"""PASCAL-Context in the packaging of the multi-task benchmarks (PASCALContext.tar.gz, ATRC; PASCAL_MT.tgz, ASTMT).

    PASCALContext/ImageSets/Context/{train,val}.txt      4998 and 5105 ids
    PASCALContext/ImageSets/Context/test_new.txt         the 2498 ids of val that papers measure boundaries on; not in
                                                         the archive
    PASCALContext/ImageSets/Parts/{train,val}.txt        JSON {id: [object categories]}; optional
    PASCALContext/JPEGImages/<id>.jpg
    PASCALContext/semseg/{VOC12,pascal-context}/<id>.png 0..20, 255 ignored; VOC12 where both exist
    PASCALContext/human_parts/<id>.mat                   PASCAL-Part annotation
    PASCALContext/sal_distill/<id>.png                   saliency, distilled: above half is salient
    PASCALContext/normals_distill/<id>.png               8-bit RGB, n = 2·v/255 - 1, distilled
    PASCALContext/pascal-context/trainval/<id>.mat       LabelMap of 459 labels: gives edges, and where normals count

Nothing is ever written there: boundaries, which take long to compute, are kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pamm.config.strict import read_json
from pamm.data.context_classes import NORMALS_LABELS
from pamm.data.files import (
    PackagedDataset,
    check_tasks,
    decode_normals,
    nearest,
    package_root,
    plane,
)
from pamm.data.matfile import MatError, read_mat
from pamm.data.sample import DataError, register_dataset
from pamm.files import cache_folder, keep, shown
from pamm.images import ImageError, read_values
from pamm.tasks import Task
from pamm.tasks.pictures import read_mask

if TYPE_CHECKING:
    from pamm.config.experiment import DataConfig

CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)
"""VOC's 20 classes after the background, in the order of their indices."""

PARTS = "background head torso upper_arm lower_arm upper_leg lower_leg"
"""Human parts in the order of their indices."""

PERSON = 15
"""Category of persons among PASCAL-Part's objects."""

_PART_NAMES = (
    "",
    "hair head lear rear lebrow rebrow leye reye mouth nose",
    "neck torso",
    "luarm ruarm",
    "llarm rlarm lhand rhand",
    "luleg ruleg",
    "llleg rlleg lfoot rfoot",
)
PART_INDEX = {name: index for index, names in enumerate(_PART_NAMES) for name in names.split()}
"""PASCAL-Part's name of a part of a person → index of the human part; l and r are left and right, also before lower."""

_FILES = {
    "semseg": ("semseg/VOC12", ".png", "semseg/pascal-context", ".png"),
    "human_parts": ("human_parts", ".mat"),
    "sal": ("sal_distill", ".png"),
    "normals": ("normals_distill", ".png"),
    "edge": ("pascal-context/trainval", ".mat"),
}
_CONTEXT = _FILES["edge"]


@register_dataset
class PascalContext(PackagedDataset):
    """PASCAL-Context: semseg (21 classes), human_parts (7), sal, normals, edge.

    Normals count on the 170 labels of `NORMALS_LABELS`; elsewhere they are ignored. An image without people has an
    all-background human_parts label, which the task ignores as a whole; with human_parts as the only task such images
    are left out.
    """

    name = "pascal"
    folder = "PASCALContext"
    lists = "ImageSets/Context"
    images = ("JPEGImages", ".jpg")
    published = MappingProxyType({"train": 4998, "val": 5105})
    added = MappingProxyType(
        {"test_new": "the 2498 ids of test_new.txt of the repository prismformore/Boundary-Detection-Evaluation-Tools"}
    )

    @classmethod
    def options(cls, config: DataConfig) -> dict[str, dict[str, Any]]:
        return {
            "semseg": {"classes": CLASSES.split()},
            "human_parts": {"classes": PARTS.split()},
            "sal": {},
            "normals": {},
            "edge": {"max_distance": 0.0075},
        }

    @classmethod
    def open(cls, config: DataConfig, split: str, tasks: Mapping[str, Task]) -> PascalContext:
        """Raises DataError for absent or incomplete data."""
        check_tasks(tasks, _FILES, "PASCAL-Context")
        dataset = cls(package_root(config, cls.folder, cls.lists, "PASCALContext.tar.gz"), split, tasks)
        for name in tasks:
            dataset.require(*_FILES[name])
        if "normals" in tasks:
            dataset.require(*_CONTEXT)
        if list(tasks) == ["human_parts"]:
            dataset.ids = dataset.with_people()
        return dataset

    def with_people(self) -> list[str]:
        """The ids whose annotation holds a person: from the Parts list if it covers all ids, else from the annotations.

        The answer for a given list of ids is kept in the user's cache.
        """
        objects = _read_json(self.root / "ImageSets" / "Parts" / f"{self.split}.txt")
        if not all(isinstance(objects.get(image_id), list) for image_id in self.ids):
            folder = self.root / "human_parts"
            key = _key(folder, "\n".join(self.ids), folder.stat().st_mtime_ns)
            cached = cache_folder("pascal") / "objects" / f"{key}.json"
            objects = _read_json(cached)
            if not all(isinstance(objects.get(image_id), list) for image_id in self.ids):
                people = ((image_id, self.path_of(image_id, *_FILES["human_parts"])) for image_id in self.ids)
                objects = {image_id: [category for category, _ in read_objects(path)] for image_id, path in people}
                keep(cached, json.dumps(objects).encode())
        ids = [image_id for image_id in self.ids if PERSON in objects[image_id]]
        if not ids:
            raise DataError(f"no image of the {self.split} split in {self.root} holds a person: add other tasks")
        return ids

    def read_label(self, name: str, image_id: str, size: tuple[int, int]) -> Tensor:
        path = self.path_of(image_id, *_FILES[name])
        if name == "normals":
            return self._read_normals(path, image_id, size)
        return torch.from_numpy(nearest(_READERS[name](path), size))[None]

    def _read_normals(self, path: Path, image_id: str, size: tuple[int, int]) -> Tensor:
        normals = decode_normals(read_values(path), size, path)
        context = nearest(read_label_map(self.path_of(image_id, *_CONTEXT)), size)
        trusted = torch.from_numpy(np.isin(context, list(NORMALS_LABELS)))
        return torch.where(trusted, normals, torch.tensor(self.tasks["normals"].ignore, dtype=normals.dtype))


def read_objects(path: Path) -> list[tuple[int, list[tuple[str, np.ndarray]]]]:
    """PASCAL-Part annotation → per object its category and parts, each a name and an (H, W) mask. Raises DataError."""
    annotation = _load_mat(path, "anno")
    try:
        listed = annotation[0][0][1]
        objects = listed[0] if listed.size else []
        found = [
            (int(entry[1][0][0]), [(str(part[0][0]), part[1]) for part in entry[3][0]] if entry[3].size else [])
            for entry in objects
        ]
        masks = [mask for _, parts in found for _, mask in parts]
        if any(mask.ndim != 2 or mask.dtype.kind not in "biuf" or mask.shape != masks[0].shape for mask in masks):
            raise ValueError("its masks are no arrays (H, W) of one size")
        return found
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path} has no PASCAL-Part structure 'anno' ({type(error).__name__}: {shown(error, 200)}). Unpack it again."
        ) from None


def read_label_map(path: Path) -> np.ndarray:
    """PASCAL-Context annotation → (H, W) whole numbers in 1..459. Raises DataError."""
    label_map = _load_mat(path, "LabelMap")
    is_map = (
        isinstance(label_map, np.ndarray) and label_map.ndim == 2 and label_map.dtype.kind in "uif" and label_map.size
    )
    if not is_map or not (label_map.min() >= 0 and label_map.max() < 2**16):  # NaN is neither
        raise DataError(f"{path} has no (H, W) array 'LabelMap' of label numbers. Unpack it again.")
    return label_map.astype(np.int32)


def boundaries(label_map: np.ndarray) -> np.ndarray:
    """(H, W) labels → (H, W) uint8, 1 on boundaries: where the Laplacian of the label numbers is not 0, thinned."""
    from scipy.ndimage import laplace
    from skimage.morphology import thin

    return thin(laplace(label_map, mode="mirror") != 0).astype(np.uint8)


def _read_semseg(path: Path) -> np.ndarray:
    return plane(read_values(path), path, len(CLASSES.split()) - 1, 255)


def _read_saliency(path: Path) -> np.ndarray:
    """Above half is salient, as the papers read these maps, which are soft."""
    return read_mask(path, soft=True)


def _read_human_parts(path: Path) -> np.ndarray:
    """Parts of all persons, later ones over earlier ones; (1, 1) of background where there is none."""
    label = None
    for category, parts in read_objects(path):
        for name, mask in parts if category == PERSON else ():
            if name not in PART_INDEX:
                raise DataError(
                    f"{path} has a person with a part '{shown(name)}', expected one of {', '.join(PART_INDEX)}."
                )
            if label is None:
                label = np.zeros(mask.shape, np.uint8)
            label[mask > 0] = PART_INDEX[name]
    return np.zeros((1, 1), np.uint8) if label is None else label


def _read_edge(path: Path) -> np.ndarray:
    """Boundaries of the LabelMap, from the user's cache if they were computed from this very file before."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Unpack it again.") from None
    key = _key(path, stat.st_size, stat.st_mtime_ns)
    cached = cache_folder("pascal") / "boundaries" / key[:2] / f"{key}.png"
    try:
        return (read_values(cached) > 0).astype(np.uint8)
    except ImageError:
        edge = boundaries(read_label_map(path))
    content = io.BytesIO()
    Image.fromarray(edge * np.uint8(255)).save(content, "PNG")
    keep(cached, content.getvalue())
    return edge


_READERS = {"semseg": _read_semseg, "human_parts": _read_human_parts, "sal": _read_saliency, "edge": _read_edge}


def _key(path: Path, *facts: object) -> str:
    return hashlib.sha256("\n".join([str(path.resolve()), *map(str, facts)]).encode()).hexdigest()[:32]


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping; an absent or damaged one is empty, and is computed anew."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _load_mat(path: Path, name: str) -> Any:
    """A variable of a MATLAB file, or None. Raises DataError."""
    try:
        return read_mat(path, (name,)).get(name)
    except FileNotFoundError:
        raise DataError(f"no file {path}. Unpack the archive again.") from None
    except (OSError, MatError) as error:
        raise DataError(f"{path} is not a whole MATLAB file ({shown(error, 200)}). Unpack it again.") from None
