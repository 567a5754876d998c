"""Depths of half a metre to ten."""

import torch

PERFECT = {"RMSE": 0, "log_RMSE": 0, "abs_rel": 0, "sq_rel": 0, "delta_1.25": 100, "delta_1.25^3": 100}
STEP = 0.0005  # label files hold whole millimetres
OFFSET = 4


def values(task, shape, generator):
    return 0.5 + 9 * torch.rand(shape, generator=generator)


def perfect(task, label):
    return torch.where(task.valid(label), label, 0.3)
