"""Scores at the images' own size, against an independent computation, and beside those in the frame."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pamm.evaluation import scores
from pamm.evaluation.scores import RESOLUTIONS, ImageResult, TaskScores
from pamm.tasks import TASKS, create_task

FRAME = (24, 32)


def shown(task, size: tuple[int, int], box: tuple[int, int, int, int], seed: int) -> ImageResult:
    """Random logits in the frame, a random label at the image's size, and the same at the frame's, as `fit` makes it."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, task.channels, *FRAME, generator=generator)
    if task.name == "normals":
        label = F.normalize(torch.randn(3, *size, generator=generator), dim=0)
    elif task.name == "depth":
        label = 0.5 + 9 * torch.rand(1, *size, generator=generator)
        logits += 4
    else:
        label = torch.randint(0, max(task.channels, 2), (1, *size), generator=generator).to(task.label_dtype)
    label[:, torch.rand(size, generator=generator) < 0.2] = task.ignore
    top, left, height, width = box
    frame = task.missing(FRAME)
    frame[:, top : top + height, left : left + width] = task.resample(label, (height, width))
    return ImageResult(
        f"image {seed}",
        torch.zeros(3, *FRAME),
        {task.name: frame[None]},
        {task.name: logits},
        size,
        box,
        {task.name: label},
    )


def images(task) -> list[ImageResult]:
    """Two that the frame shrank and one that it holds as it is."""
    return [
        shown(task, (60, 80), (0, 0, 24, 32), 0),
        shown(task, (21, 30), (1, 1, 21, 30), 1),
        shown(task, (90, 50), (0, 9, 24, 13), 2),
    ]


def measure(task, shown: list[ImageResult], resolutions) -> dict[str, dict[str, float]]:
    scores = TaskScores(task, resolutions)
    for one in shown:
        scores.update(one)
    return scores.compute()


def at_own_size(task, one: ImageResult) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits brought to the image's size by torch, the label there, and its valid pixels, as arrays (c, H, W)."""
    top, left, height, width = one.box
    logits = one.logits[task.name][..., top : top + height, left : left + width].double()
    logits = F.interpolate(logits, size=one.size, mode="bilinear", align_corners=False)[0].numpy()
    label = one.original[task.name].numpy()
    return logits, label, (label != task.ignore).any(0)


def test_iou_at_the_images_own_size() -> None:
    task = create_task("semseg", classes=["sky", "tree", "road", "car"])
    hits, union = np.zeros(4), np.zeros(4)
    for one in images(task):
        logits, label, valid = at_own_size(task, one)
        guess, truth = logits.argmax(0)[valid], label[0][valid]
        for c in range(4):
            hits[c] += np.sum((guess == c) & (truth == c))
            union[c] += np.sum((guess == c) | (truth == c))
    found = measure(task, images(task), RESOLUTIONS)["original"]
    assert found["mIoU"] == pytest.approx(100 * np.mean(hits / union), rel=1e-5)
    for c, name in enumerate(task.classes):
        assert found[f"IoU/{name}"] == pytest.approx(100 * hits[c] / union[c], rel=1e-5)


def test_depth_and_normals_at_the_images_own_size() -> None:
    depth, normals = create_task("depth"), create_task("normals")
    errors = []
    for one in images(depth):
        logits, label, valid = at_own_size(depth, one)
        errors.append((np.maximum(logits[0], 1e-9) - label[0])[valid])
    found = measure(depth, images(depth), RESOLUTIONS)["original"]
    assert found["RMSE"] == pytest.approx(np.sqrt(np.mean(np.concatenate(errors) ** 2)), rel=1e-5)
    angles = []
    for one in images(normals):
        logits, label, valid = at_own_size(normals, one)
        cosine = np.sum(logits * label, 0) / np.linalg.norm(logits, axis=0)
        angles.append(np.degrees(np.arccos(cosine.clip(-1, 1)))[valid])
    angles = np.concatenate(angles)
    found = measure(normals, images(normals), RESOLUTIONS)["original"]
    assert found["mErr"] == pytest.approx(angles.mean(), rel=1e-4)
    assert found["RMSE"] == pytest.approx(np.sqrt(np.mean(angles**2)), rel=1e-4)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_both_resolutions_at_once_are_each_alone(name: str) -> None:
    """Though an image of its own size is then measured once for both."""
    task = create_task(name)
    both = measure(task, images(task), RESOLUTIONS)
    assert both["frame"] == measure(task, images(task), ("frame",))["frame"]
    assert both["original"] == measure(task, images(task), ("original",))["original"]
    assert "loss" in both["frame"] and "loss" not in both["original"]
    alone = measure(task, images(task)[1:2], RESOLUTIONS)
    assert {key: value for key, value in alone["frame"].items() if key != "loss"} == alone["original"]
    assert not all(math.isnan(value) for value in alone["original"].values())


@pytest.mark.parametrize("name", sorted(TASKS))
def test_strips_of_rows_change_nothing(name: str, monkeypatch) -> None:
    task = create_task(name)
    whole = measure(task, images(task), ("original",))
    monkeypatch.setattr(scores, "STRIP_VALUES", task.channels * 80 * 7)
    assert measure(task, images(task), ("original",)) == whole


def test_an_image_without_a_label_is_left_out_at_its_own_size() -> None:
    task = create_task("depth")
    one, two, three = images(task)
    unlabelled = ImageResult(two.id, two.image, {"depth": task.missing(FRAME)[None]}, two.logits, (70, 80), two.box, {})
    assert measure(task, [one, unlabelled, three], RESOLUTIONS) == measure(task, [one, three], RESOLUTIONS)
