"""Random labels and logits of every task, and the logits that predict a label exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pamm.tasks import Task

PERFECT = {
    "semseg": {"mIoU": 100, "pixel_accuracy": 100},
    "human_parts": {"mIoU": 100, "pixel_accuracy": 100},
    "sal": {"maxF": 100, "maxF_released": 100},
    "edge": {"odsF": 100, "oisF": 100},
    "normals": {"mErr": 0, "RMSE": 0, "within_11.25": 100, "within_22.5": 100, "within_30": 100},
    "depth": {"RMSE": 0, "log_RMSE": 0, "abs_rel": 0, "sq_rel": 0, "delta_1.25": 100, "delta_1.25^3": 100},
}
"""Task → the scores of a perfect prediction."""

SLACK = {"edge": 5.0}
"""Task → what a perfect prediction may miss: the boundary benchmark suppresses pixels at the border and where lines meet."""


def random_label(task: Task, batch: int = 4, size: tuple[int, int] = (24, 36), seed: int = 0) -> Tensor:
    """(B, c, H, W) label with a fifth of its pixels ignored; every class occurs. Boundaries are two lines that meet."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 1, *size)
    if task.name == "normals":
        label = F.normalize(torch.randn(batch, 3, *size, generator=generator), dim=1)
    elif task.name == "depth":
        label = 0.5 + 9 * torch.rand(shape, generator=generator)
    elif task.name == "edge":
        label = torch.zeros(shape, dtype=torch.int64)
        rows = torch.randint(size[0] // 4, size[0] // 2 + 1, (batch,), generator=generator).tolist()
        for image, row in enumerate(rows):
            label[image, 0, row] = 1
            label[image, 0, row:, size[1] // 2] = 1
    else:
        label = torch.randint(0, max(task.channels, 2), shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < 0.2
    return torch.where(ignored, task.ignore, label).to(task.label_dtype)


def random_logits(task: Task, label: Tensor, seed: int = 1) -> Tensor:
    """(B, channels, H, W) float32."""
    generator = torch.Generator().manual_seed(seed)
    return (
        3 * torch.randn(label.shape[0], task.channels, *label.shape[-2:], generator=generator)
        + (task.name == "depth") * 4
    )


def write_label(task: Task, prediction: np.ndarray, path: Path) -> Path:
    """The prediction as the task's label file, under the path's name."""
    suffix, content = task.label_file(prediction)
    path = path.with_suffix(suffix)
    path.write_bytes(content)
    return path


def perfect_logits(task: Task, label: Tensor) -> Tensor:
    """Logits whose prediction equals the label on its valid pixels."""
    if task.name in ("depth", "normals"):
        return torch.where(task.valid(label), label, 0.3)
    if task.channels == 1:
        return 20.0 * (label == 1) - 10.0
    index = torch.where(label == task.ignore, 0, label)[:, 0].long()
    return 20.0 * F.one_hot(index, task.channels).movedim(-1, 1)
