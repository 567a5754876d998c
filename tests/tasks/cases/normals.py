"""Unit vectors in every direction."""

import torch
from torch.nn import functional as F

PERFECT = {"mErr": 0, "RMSE": 0, "within_11.25": 100, "within_22.5": 100, "within_30": 100}
STEP = 0.5 / 127.5  # label files hold 8 bits of -1 to 1
MODE = "RGB"


def values(task, shape, generator):
    return F.normalize(torch.randn(shape[0], 3, *shape[2:], generator=generator), dim=1)


def perfect(task, label):
    return torch.where(task.valid(label), label, 0.3)
