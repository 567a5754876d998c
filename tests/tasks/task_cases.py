"""Random labels and logits of every task, and the logits that predict a label exactly.

What suits a task stands in `cases/<task>.py`, all of it optional, as the file of a task whose labels are classes shows by its
absence:

    PERFECT                          the scores of a perfect prediction, by name
    SLACK                            what a perfect prediction's score may miss
    STEP                             what a saved prediction may differ by; None for one that is saved as a mask
    MODE                             Pillow's mode of its label files' pictures
    values(task, shape, generator)   random labels (B, c, H, W) of shape (B, 1, H, W), no pixel ignored
    OFFSET                           what is added to random logits
    perfect(task, label)             logits whose prediction is the label
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pamm.tasks import Task

DEFAULTS = {"PERFECT": {"mIoU": 100, "pixel_accuracy": 100}, "SLACK": 1e-5, "STEP": 0.0, "MODE": "L"}


def of_case(task: Task, name: str) -> Any:
    """What the task's own file says, else the default."""
    try:
        case = import_module(f"cases.{task.name}")
    except ModuleNotFoundError as error:
        if error.name not in ("cases", f"cases.{task.name}"):
            raise
        case = None
    return getattr(case, name, DEFAULTS.get(name))


def random_label(task: Task, batch: int = 4, size: tuple[int, int] = (24, 36), seed: int = 0) -> Tensor:
    """(B, c, H, W) label with a fifth of its pixels ignored; every class occurs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 1, *size)
    values = of_case(task, "values")
    label = values(task, shape, generator) if values else torch.randint(0, task.channels, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < 0.2
    return torch.where(ignored, task.ignore, label).to(task.label_dtype)


def random_logits(task: Task, label: Tensor, seed: int = 1) -> Tensor:
    """(B, channels, H, W) float32."""
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(label.shape[0], task.channels, *label.shape[-2:], generator=generator)
    return values + (of_case(task, "OFFSET") or 0)


def write_label(task: Task, prediction: np.ndarray, path: Path) -> Path:
    """The prediction as the task's label file, under the path's name."""
    suffix, content = task.label_file(prediction)
    path = path.with_suffix(suffix)
    path.write_bytes(content)
    return path


def perfect_logits(task: Task, label: Tensor) -> Tensor:
    """Logits whose prediction equals the label on its valid pixels."""
    own = of_case(task, "perfect")
    if own:
        return own(task, label)
    index = torch.where(label == task.ignore, 0, label)[:, 0].long()
    return 20.0 * F.one_hot(index, task.channels).movedim(-1, 1)
