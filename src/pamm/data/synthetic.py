"""Synthetic rooms: furniture, people and one salient object, ray-cast with exact labels for all six tasks.

Nothing is downloaded. A sample depends only on (seed, split, index, size). It is computed when it is first read and
kept in a cache.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from pamm.data.sample import DataError, Dataset, Sample, register_dataset
from pamm.data.scenes import CLASSES, PARTS
from pamm.files import cache_folder, replacing
from pamm.runtime.workers import serve_parent
from pamm.tasks import Task

if TYPE_CHECKING:
    from pamm.config.experiment import DataConfig

VERSION = 1
"""Version of the scenes. Raise it with every change of them: a cache of another version is neither read nor changed."""

SPLITS = ("train", "val")

LAYOUT: dict[str, tuple[int, type[np.generic]]] = {
    "image": (3, np.uint8),
    "semseg": (1, np.uint8),
    "human_parts": (1, np.uint8),
    "sal": (1, np.uint8),
    "edge": (1, np.uint8),
    "depth": (1, np.float32),
    "normals": (3, np.float32),
}
"""Maps of a cache file in their order: channels and type. A file is their bytes, compressed by zlib, which checks them."""


@dataclass(frozen=True)
class _Key:
    """The settings that determine a sample, without its index, and the place of its split in the cache."""

    root: Path
    seed: int
    split: str
    size: tuple[int, int]

    @property
    def folder(self) -> Path:
        return self.root / f"v{VERSION}-{self.size[0]}x{self.size[1]}-seed{self.seed}" / self.split

    def file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.z"


@register_dataset
class SyntheticDataset(Dataset):
    """Rendered rooms with labels for semseg, human_parts, sal, edge, depth and normals, every pixel of them valid.

    semseg: 15 classes. human_parts: 0 outside people. sal: the visible pixels of the salient object. edge: lines one pixel
    wide along the borders of objects. depth: metres along the camera's axis. normals: unit vectors, x right, y up, z
    towards the viewer.
    """

    name = "synthetic"

    def __init__(self, key: _Key, count: int, tasks: Mapping[str, Task]):
        self.split = key.split
        self.tasks = tasks
        self.ids = [f"{key.split}-{index:06d}" for index in range(count)]
        self._key = key

    @classmethod
    def options(cls, config: DataConfig) -> dict[str, dict[str, Any]]:
        return {
            "semseg": {"classes": list(CLASSES)},
            "human_parts": {"classes": list(PARTS)},
            "sal": {},
            "edge": {},
            "depth": {},
            "normals": {},
        }

    @classmethod
    def open(cls, config: DataConfig, split: str, tasks: Mapping[str, Task]) -> SyntheticDataset:
        """Raises DataError for settings that make no images, and where images are to be made without the renderer."""
        if split not in SPLITS:
            raise DataError(f"synthetic data has no split '{split}'; it has: {', '.join(SPLITS)}")
        for name in tasks:
            if name not in cls.options(config):
                raise DataError(f"synthetic data has no labels for '{name}'; it has: {', '.join(cls.options(config))}")
        count = config.images[SPLITS.index(split)]
        if count < 1:
            raise DataError(
                f"synthetic data: data.images is {config.images}, which asks for {count} images of split '{split}'. "
                "Set the number of training and validation images, e.g. (1200, 60)."
            )
        if config.seed < 0 or min(config.size) < 1:
            raise DataError(
                f"synthetic data: data.seed is {config.seed} and data.size {config.size}; expected a seed of 0 or more "
                "and a height and width of at least one pixel"
            )
        dataset = cls(_Key(_root(config), config.seed, split, config.size), count, tasks)
        if dataset.absent():
            _require_renderer()
        return dataset

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"synthetic data: sample {index} of {len(self)}")
        maps = _load(self._key, index % len(self))
        labels = {name: torch.from_numpy(maps[name].copy()) for name in self.tasks}
        return Sample(self.ids[index], torch.from_numpy(maps["image"].copy()), labels, self._key.size)

    def notes(self) -> list[str]:
        absent = len(self.absent())
        told = f"{absent} of {len(self)} images are not made yet; each is made when it is first asked for"
        return [told] if absent else []

    def prepare(self, progress: bool = True, workers: int = 0) -> None:
        """Compute every sample that is not in the cache.

        progress: show a bar. workers: number of processes that compute; 0 computes in this one. A script that asks for
        workers must guard its entry point with `if __name__ == "__main__"`. Raises DataError.
        """
        todo = self.absent()
        if not todo:
            return
        _require_renderer()
        bar = tqdm(total=len(todo), desc=f"synthetic rooms ({self.split})", unit="image", disable=not progress)
        with bar:
            if workers < 1:
                for index in todo:
                    _store(self._key, index)
                    bar.update()
                return
            context = multiprocessing.get_context("spawn")
            try:
                with ProcessPoolExecutor(workers, context, serve_parent) as pool:
                    for _ in pool.map(_store, [self._key] * len(todo), todo, chunksize=8):
                        bar.update()
            except BrokenProcessPool:
                raise DataError(
                    "a process that made synthetic rooms ended before its rooms were done, most likely for want of memory. Run "
                    "the command again with more of it: what is made is kept"
                ) from None

    def absent(self) -> list[int]:
        """Indices of the samples that are not in the cache: what `prepare` would compute."""
        try:
            present = set(os.listdir(self._key.folder))
        except OSError:
            present = set()
        return [index for index in range(len(self)) if self._key.file(index).name not in present]


def _root(config: DataConfig) -> Path:
    if config.root is not None:
        return Path(os.path.expanduser(config.root))
    return cache_folder("synthetic")


def _require_renderer() -> None:
    """Raise DataError where the libraries that make the rooms are absent."""
    for module in ("trimesh", "embreex", "skimage"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise DataError(
                f"synthetic data is made with trimesh, embreex and scikit-image, and '{module}' cannot be imported "
                f'({error}). Install them: pip install "pamm[demo,train]"'
            ) from None


def _load(key: _Key, index: int) -> dict[str, np.ndarray]:
    """Map name → (c, H, W), from the cache; an absent or damaged file is made anew."""
    try:
        return _unpack(zlib.decompress(key.file(index).read_bytes()), key.size)
    except (FileNotFoundError, ValueError, zlib.error):
        _require_renderer()
        return _store(key, index)
    except OSError as error:
        raise _unusable(key, error) from None


def _unpack(data: bytes, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Raises ValueError for data of another length."""
    maps, start, area = {}, 0, size[0] * size[1]
    for name, (channels, kind) in LAYOUT.items():
        maps[name] = np.frombuffer(data, kind, channels * area, start).reshape(channels, *size)
        start += maps[name].nbytes
    if start != len(data):
        raise ValueError(f"{len(data)} bytes, expected {start}")
    return maps


def _store(key: _Key, index: int) -> dict[str, np.ndarray]:
    """Compute a sample and put it into the cache in one step, so that no reader meets half a file."""
    from pamm.data.scenes.render import scene

    maps = scene(np.random.default_rng([key.seed, SPLITS.index(key.split), index]), key.size)
    data = zlib.compress(b"".join(maps[name].astype(kind).tobytes() for name, (_, kind) in LAYOUT.items()), 1)
    try:
        key.folder.mkdir(parents=True, exist_ok=True)
        with replacing(key.file(index)) as new:
            new.write_bytes(data)
    except OSError as error:
        raise _unusable(key, error) from None
    return maps


def _unusable(key: _Key, error: OSError) -> DataError:
    return DataError(
        f"the cache of the synthetic data at {key.root} cannot be used: {error}. "
        "Set data.root to a folder that can be written and has free space."
    )
