"""Transforms from a sample as read to the input of the network: zoom, crop, mirror, colour, normalise, pad.

The order and the ranges are those of the multi-task benchmarks on NYUD-v2 and PASCAL-Context (ATRC and its successors).
Every random number comes from a generator seeded by (seed, epoch, index), so that a sample has the same bits in any process,
on any number of threads. On another processor OpenCV's conversion from HSV may round a colour the other way: by one level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pamm.config.strict import ConfigError
from pamm.data.sample import Box, DataError, Sample
from pamm.tasks import Task

if TYPE_CHECKING:
    from pamm.config.experiment import DataConfig

MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's RGB values in 0..1."""
STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's RGB values in 0..1."""

_REDRAWS = 10


def frame(size: tuple[int, int], config: DataConfig) -> Box:
    """Where an image of `size` (H, W) lies inside the padded evaluation frame: (top, left, height, width).

    With `config.fit`, height and width are those of the shrunk image. Raises DataError for an image that is larger than
    the frame while `fit` is off.
    """
    height, width = _fitting(size, config.frame) if config.fit else size
    if height > config.frame[0] or width > config.frame[1]:
        name = "data.label_size" if config.label_size else "data.size"
        raise DataError(
            f"an image of {height} x {width} does not fit into the frame of {config.frame[0]} x {config.frame[1]}. "
            f"Set {name} to at least {height} x {width} (multiples of the backbone's stride), or data.fit to shrink larger images."
        )
    return (config.frame[0] - height) // 2, (config.frame[1] - width) // 2, height, width


def normalize(image: np.ndarray) -> Tensor:
    """(3, H, W) values in 0..255 → float32 tensor with ImageNet's mean and standard deviation taken out."""
    scale = (1 / (255 * np.array(STD))).astype(np.float32)
    shift = (np.array(MEAN) / np.array(STD)).astype(np.float32)
    return torch.from_numpy(image.astype(np.float32) * scale[:, None, None] - shift[:, None, None])


def denormalize(image: Tensor) -> np.ndarray:
    """Inverse of `normalize`: (3, H, W) float → (H, W, 3) uint8."""
    pixels = image.cpu().movedim(0, -1).numpy() * np.array(STD) + np.array(MEAN)
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def seen(box: Box, config: DataConfig) -> Box:
    """`box` of the frame → the same box in the network's input, in its pixels."""
    height, width = _seen_size(box[2:], config)
    return (config.size[0] - height) // 2, (config.size[1] - width) // 2, height, width


class EvalTransform:
    """Normalise and pad to the frame, the image in the centre; with `config.fit` larger images shrink first.

    With `config.label_size` labels have that size and the image is shrunk from it to `config.size` (antialiased bilinear).
    original: the samples also hold their labels at the image's own size.
    """

    def __init__(self, tasks: Mapping[str, Task], config: DataConfig, *, original: bool = False):
        self.tasks = tasks
        self.config = config
        self.original = original

    def __call__(self, sample: Sample) -> Sample:
        """Image (3, H, W) uint8 → (3, *config.size) float32, labels (c, *config.frame). Raises DataError (see `frame`)."""
        try:
            box = frame(sample.size, self.config)
        except DataError as error:
            raise DataError(f"{sample.id}: {error}") from None
        image, labels = sample.image.numpy(), sample.labels
        if self.config.fit:
            image, labels = _shrink(image, labels, self.tasks, self.config.frame)
        original = None
        if self.original:
            original = {name: self.tasks[name].finish(label) for name, label in sample.labels.items()}
        return replace(_finish(sample, image, labels, self.tasks, self.config), box=box, original=original)


class TrainTransform:
    """Random zoom, crop, mirror and colour, then as `EvalTransform`. Raises ConfigError for a senseless range of zoom."""

    def __init__(self, tasks: Mapping[str, Task], config: DataConfig, seed: int = 0):
        if not 0 < config.scale[0] <= config.scale[1]:
            raise ConfigError(f"data.scale: found {config.scale}, expected two rising factors above 0, e.g. 0.5 2.0")
        self.tasks = tasks
        self.config = config
        self.seed = seed

    def __call__(self, sample: Sample, epoch: int, index: int) -> Sample:
        """Image (3, H, W) uint8 → (3, *config.size) float32, labels (c, *config.frame), fixed by (seed, epoch, index)."""
        random = np.random.default_rng((1, self.seed, epoch, index))
        image, labels, config = sample.image.numpy(), sample.labels, self.config
        if config.fit:
            image, labels = _shrink(image, labels, self.tasks, config.frame)
        factor = random.uniform(*config.scale)
        zoomed = (max(1, int(image.shape[-2] * factor)), max(1, int(image.shape[-1] * factor)))
        labels = {
            name: self.tasks[name].rescale(self.tasks[name].resample(label, zoomed), factor)
            for name, label in labels.items()
        }
        box = self._draw_box(zoomed, labels, random)
        top, left, height, width = box
        image = bilinear(image, zoomed, box)
        labels = {name: label[:, top : top + height, left : left + width] for name, label in labels.items()}
        if random.random() < config.flip:
            image = image[..., ::-1]
            labels = {name: self.tasks[name].flip(label) for name, label in labels.items()}
        if config.color:
            image = photometric_distortion(image.astype(np.uint8), random)
        return _finish(sample, image, labels, self.tasks, config)

    def _draw_box(self, size: tuple[int, int], labels: Mapping[str, Tensor], random: np.random.Generator) -> Box:
        """A crop in which no class dominates; the last one drawn if ten redraws find none."""
        limits = [max(size[i] - self.config.frame[i], 0) for i in (0, 1)]
        height, width = (min(size[i], self.config.frame[i]) for i in (0, 1))

        def draw() -> Box:
            return int(random.integers(limits[0] + 1)), int(random.integers(limits[1] + 1)), height, width

        box = draw()
        judge = next((name for name in labels if self.tasks[name].balances_crops), None)
        if judge is None or limits == [0, 0]:
            return box
        label, ignore = labels[judge][0].numpy(), self.tasks[judge].ignore
        for _ in range(_REDRAWS):
            top, left = box[:2]
            crop = label[top : top + height, left : left + width]
            counts = np.bincount(crop[crop != ignore])
            if np.count_nonzero(counts) > 1 and counts.max() < self.config.largest_class * counts.sum():
                break
            box = draw()
        return box


def bilinear(image: np.ndarray, size: tuple[int, int], box: Box) -> np.ndarray:
    """The window `box` of the (3, H, W) image resized bilinearly to `size`, float32."""
    top, left, height, width = box
    whole = _opencv().resize(_interleaved(image).astype(np.float32), (size[1], size[0]))
    return whole[top : top + height, left : left + width].transpose(2, 0, 1)


def photometric_distortion(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue of a (3, H, W) uint8 RGB image, each changed with probability 1/2.

    Shift of ±32, factors of 0.5 to 1.5, hue shift of -18..17 (steps of 2°); contrast comes before or after the colours.
    Each step clips to 0..255 and truncates to uint8 (PhotoMetricDistortion of MMSegmentation).
    """
    cv2, image, same = _opencv(), _interleaved(image), np.arange(256, dtype=np.uint8)

    def recoloured(image: np.ndarray, hue: np.ndarray, saturation: np.ndarray) -> np.ndarray:
        planes = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), np.stack([hue, saturation, same], -1)[None])
        return cv2.cvtColor(planes, cv2.COLOR_HSV2RGB)

    if random.integers(2):
        image = cv2.LUT(image, _affine(random.uniform(-32, 32), 1.0))
    contrast_first = bool(random.integers(2))
    if contrast_first and random.integers(2):
        image = cv2.LUT(image, _affine(0.0, random.uniform(0.5, 1.5)))
    if random.integers(2):
        image = recoloured(image, same, _affine(0.0, random.uniform(0.5, 1.5)))
    if random.integers(2):
        shift = int(random.integers(-18, 18))
        image = recoloured(image, ((np.arange(256) + shift) % 180).astype(np.uint8), same)
    if not contrast_first and random.integers(2):
        image = cv2.LUT(image, _affine(0.0, random.uniform(0.5, 1.5)))
    return image.transpose(2, 0, 1)


def _opencv() -> ModuleType:
    """OpenCV without threads of its own, which a forked process would wait for."""
    import cv2

    cv2.setNumThreads(0)
    return cv2


def _interleaved(image: np.ndarray) -> np.ndarray:
    """(3, H, W) → (H, W, 3), contiguous, as OpenCV takes pictures."""
    return np.ascontiguousarray(image.transpose(1, 2, 0))


def _affine(shift: float, factor: float) -> np.ndarray:
    """Table of the 256 values v·factor + shift, clipped and truncated to uint8."""
    values = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(shift)
    return np.clip(values, 0, 255).astype(np.uint8)


def _fitting(size: tuple[int, int], limit: tuple[int, int]) -> tuple[int, int]:
    """(H, W) shrunk in proportion until it is at most `limit`; smaller sizes stay."""
    factor = min(limit[0] / size[0], limit[1] / size[1], 1.0)
    height, width = (min(limit[i], max(1, round(size[i] * factor))) for i in (0, 1))
    return height, width


def _shrink(
    image: np.ndarray, labels: Mapping[str, Tensor], tasks: Mapping[str, Task], limit: tuple[int, int]
) -> tuple[np.ndarray, Mapping[str, Tensor]]:
    """Antialiased image and resampled labels, of a size that fits into `limit`; values of labels stay as they are."""
    size = _fitting(image.shape[-2:], limit)
    if size == image.shape[-2:]:
        return image, labels
    return _resized(image, size), {name: tasks[name].resample(label, size) for name, label in labels.items()}


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(3, H, W) values in 0..255 → (3, *size) uint8, antialiased bilinear (Pillow's)."""
    picture = Image.fromarray(_interleaved(np.rint(image).astype(np.uint8)))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def _finish(
    sample: Sample,
    image: np.ndarray,
    labels: Mapping[str, Tensor],
    tasks: Mapping[str, Task],
    config: DataConfig,
) -> Sample:
    """Normalise, centre and pad the image, and apply each task's `finish`."""
    frame, size = config.frame, config.size
    labels = {name: tasks[name].finish(_pad(label, frame, tasks[name].ignore)) for name, label in labels.items()}
    if frame != size:
        image = _resized(image, _seen_size(image.shape[1:], config))
    return Sample(sample.id, _pad(normalize(image), size, 0), labels, sample.size)


def _seen_size(size: tuple[int, int], config: DataConfig) -> tuple[int, int]:
    """(H, W) inside the frame → (H, W) in the network's image: its share of the whole stays the same."""
    height, width = (max(1, round(size[i] * config.size[i] / config.frame[i])) for i in (0, 1))
    return height, width


def _pad(values: Tensor, size: tuple[int, int], fill: float) -> Tensor:
    height, width = values.shape[-2:]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    padded = torch.full((values.shape[0], *size), fill, dtype=values.dtype)
    padded[:, top : top + height, left : left + width] = values
    return padded
