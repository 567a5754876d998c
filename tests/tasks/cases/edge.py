"""Boundaries: two lines that meet."""

import torch

PERFECT = {"odsF": 100, "oisF": 100}
SLACK = 5.0  # the benchmark suppresses pixels at the border and where lines meet
STEP = None


def values(task, shape, generator):
    batch, _, height, width = shape
    label = torch.zeros(shape, dtype=torch.int64)
    rows = torch.randint(height // 4, height // 2 + 1, (batch,), generator=generator).tolist()
    for image, row in enumerate(rows):
        label[image, 0, row] = 1
        label[image, 0, row:, width // 2] = 1
    return label


def perfect(task, label):
    return 20.0 * (label == 1) - 10.0
