"""Losses and metrics against the published implementation's outputs."""

from __future__ import annotations

import pytest
import torch

import golden
from pamm.tasks import Task, create_task

NAMES = {
    "semseg": "semseg",
    "parts": "human_parts",
    "sal": "sal",
    "edge": "edge",
    "normals": "normals",
    "depth": "depth",
}
METRICS = {
    "metric/semseg/mIoU": "mIoU",
    "metric/parts/mIoU": "mIoU",
    "metric/depth/rmse": "RMSE",
    "metric/depth/log_rmse": "log_RMSE",
    "metric/depth/abs_rel": "abs_rel",
    "metric/depth/sq_rel": "sq_rel",
    "metric/normals/mean": "mErr",
    "metric/sal/maxF": "maxF_released",
}


@pytest.fixture(scope="module")
def published():
    return golden.losses()


def case(published, name: str, **options) -> tuple[Task, torch.Tensor, torch.Tensor]:
    maps = published[1]
    if name == "semseg":
        options["classes"] = [f"class {i}" for i in range(maps["semseg/logits"].shape[1])]
    task = create_task(NAMES[name], **options)
    return task, maps[f"{name}/logits"], maps[f"{name}/label"].to(task.label_dtype)


@pytest.mark.parametrize("name", NAMES)
def test_losses(published, name: str) -> None:
    task, logits, label = case(published, name)
    assert task.loss(logits, label).item() == pytest.approx(published[0][f"loss/{name}"], rel=1e-5)


def test_edge_loss_with_another_weight(published) -> None:
    task, logits, label = case(published, "edge", positive_weight=0.88)
    assert task.loss(logits, label).item() == pytest.approx(published[0]["loss/edge@0.88"], rel=1e-5)


@pytest.mark.parametrize("key", METRICS)
def test_metrics(published, key: str) -> None:
    task, logits, label = case(published, key.split("/")[1])
    metric = task.metric()
    metric.update(logits[:2], label[:2])
    metric.update(logits[2:], label[2:])
    assert float(metric.compute()[METRICS[key]]) == pytest.approx(published[0][key], rel=1e-5)
    assert {k for k in published[0] if k.startswith("metric/")} == set(METRICS)
