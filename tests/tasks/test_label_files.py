"""Depth's units and bounds, normals without a direction, label files of predictions, and what labels are counted to hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from task_cases import random_label, write_label

from pamm.tasks import TASKS, LabelStatistics, create_task

RNG = np.random.default_rng(0)


def depth_png(path, steps):
    Image.fromarray(np.asarray(steps, np.uint16)).save(path)
    return path


@pytest.mark.parametrize(
    ("unit", "steps"), [("metre", 1), ("millimetre", 1000), ("disparity", 256), (1, 1), (100, 100), (256, 256)]
)
def test_the_steps_of_a_metre_can_be_named_or_counted(tmp_path, unit, steps):
    path = depth_png(tmp_path / "a.png", [[0, 1, 512, 65535]])
    task = create_task("depth", unit=unit)
    np.testing.assert_allclose(task.read(path)[0, 0], np.array([0, 1, 512, 65535]) / steps, rtol=1e-6)
    assert create_task("depth", **task.options()).options() == task.options()
    zoomed = task.rescale(torch.tensor([[[2.0]]]), 2.0).item()
    assert zoomed == (4.0 if unit == "disparity" else 1.0)


@pytest.mark.parametrize("steps", [256.5, 4000, 5000, 10000, "256"])
def test_other_steps_of_a_metre(tmp_path, steps):
    path = depth_png(tmp_path / "a.png", [[20000]])
    assert create_task("depth", unit=steps).read(path).item() == pytest.approx(20000 / float(steps))


@pytest.mark.parametrize("unit", ["inch", "mm", 0, -256, "", "nan", "-3"])
def test_other_units_are_refused_with_those_there_are(unit):
    with pytest.raises(
        ValueError, match=r"task 'depth': unit is .*'millimetre', 'metre', the steps of a metre .*256.*disparity"
    ):
        create_task("depth", unit=unit)


def test_the_length_of_a_step_is_told_from_the_number_of_steps():
    with pytest.raises(ValueError, match=r"steps of 0\.001 m each are 1000 a metre"):
        create_task("depth", unit=0.001)


@pytest.mark.parametrize(("maximum", "kept"), [(None, 5), (1e10, 4), (80, 3), (65.535, 2), (3, 1)])
def test_depths_from_the_maximum_on_are_unknown(tmp_path, maximum, kept):
    np.save(tmp_path / "a.npy", np.array([[1.5, 3.0, 70.0, 100.0, 1e10, np.inf, -1, 0]], np.float32))
    task = create_task("depth", maximum=maximum)
    label = task.read(tmp_path / "a.npy")
    assert task.valid(label).sum() == kept
    logits = torch.full((1, 1, *label.shape[-2:]), 2.0)
    known = label[label > 0]
    assert task.loss(logits, label[None]).item() == pytest.approx((known - 2).abs().mean().item())


def test_a_sentinel_of_a_png_is_left_out_by_its_depth(tmp_path):
    path = depth_png(tmp_path / "a.png", [[0, 1000, 65534, 65535]])
    assert create_task("depth", maximum=65.535).read(path).flatten().tolist() == pytest.approx([0, 1, 65.534, 0])


def test_limit_leaves_the_loss_alone(tmp_path):
    path = depth_png(tmp_path / "a.png", [[1000, 5000]])
    task = create_task("depth", limit=2)
    label = task.read(path)[None]
    assert task.loss(torch.zeros(1, 1, 1, 2), label).item() == pytest.approx(3.0)
    metric = task.metric()
    metric.update(torch.zeros(1, 1, 1, 2), label)
    assert metric.compute()["RMSE"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("unit", ["metre", "millimetre", "disparity", 1, 100, 256, 5000])
@pytest.mark.parametrize("farthest", [3.3, 64.9, 300.0, 70_000.0])
def test_what_is_predicted_reads_back_in_the_folder_it_is_written_to(tmp_path, unit, farthest):
    task = create_task("depth", unit=unit)
    depth = np.linspace(0, farthest, 63, dtype=np.float32).reshape(7, 9)
    path = write_label(task, depth, tmp_path / "a")
    assert path.suffix in task.suffixes
    error = np.abs(task.read(path)[0].numpy() - depth).max()
    assert error <= 0.5 / max(task.steps, 100) + 1e-5
    assert path.suffix == (".png" if task.steps >= 100 and farthest * task.steps <= 65535 else ".npy")


def test_no_depth_is_cut_or_made_of_what_is_no_number(tmp_path):
    task = create_task("depth")
    read = task.read(write_label(task, np.array([[65.5351, 65.6, 1e6]]), tmp_path / "far"))
    assert read.flatten().tolist() == pytest.approx([65.5351, 65.6, 1e6])
    read = task.read(write_label(task, np.array([[np.nan, np.inf, -1.0, 2.0]]), tmp_path / "odd"))
    assert read.flatten().tolist() == pytest.approx([0, 0, 0, 2])


# -- normals ---------------------------------------------------------------------------------------------------------------


def directions(count: int = 20_000) -> np.ndarray:
    """(count, 3) unit vectors, the axes and diagonals among them."""
    vectors = RNG.normal(size=(count, 3))
    vectors[:27] = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), -1).reshape(27, 3)
    vectors = vectors[np.linalg.norm(vectors, axis=1) > 0]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def normals_label(tmp_path, values: np.ndarray) -> torch.Tensor:
    Image.fromarray(np.asarray(values, np.uint8)).save(tmp_path / "a.png")
    return create_task("normals").read(tmp_path / "a.png")


@pytest.mark.parametrize(
    "store",
    [
        lambda n: np.rint((n + 1) * 127.5),
        lambda n: np.floor((n + 1) * 127.5),
        lambda n: np.rint(n * 127 + 128),
        lambda n: np.floor((n + 1) * 128).clip(max=255),
        lambda n: np.rint(n * 127 + 127),
    ],
)
def test_unit_vectors_are_kept_however_they_were_rounded(tmp_path, store):
    label = normals_label(tmp_path, store(directions())[None])
    assert create_task("normals").valid(label).all()


@pytest.mark.parametrize(
    "value",
    [(0, 0, 0), (127, 127, 127), (128, 128, 128), (127, 128, 127), (255, 255, 255), (255, 128, 255), (128, 128, 180)],
)
def test_what_has_not_the_length_of_a_direction_is_unknown(tmp_path, value):
    values = np.full((2, 3, 3), (128, 128, 255))
    values[1, 2] = value
    task, label = create_task("normals"), normals_label(tmp_path, values)
    assert task.valid(label)[0].tolist() == [[True, True, True], [True, True, False]]
    assert label[:, 1, 2].tolist() == [255, 255, 255]
    assert task.statistics(label).ignored_share == pytest.approx(1 / 6)


# -- statistics --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TASKS))
def test_what_labels_hold_adds_up(name):
    task = create_task(name)
    labels = [*random_label(task), task.missing((5, 6))]
    total = sum((task.statistics(label) for label in labels), LabelStatistics())
    joined = torch.cat([label.flatten(1) for label in labels], 1)[:, None]
    known = (joined != task.ignore).any(0)
    assert (total.labels, total.empty) == (5, 1)
    assert (total.pixels, total.ignored) == (known.numel(), int((~known).sum()))
    assert total.ignored_share == total.ignored / total.pixels
    if name in ("semseg", "human_parts", "sal", "edge"):
        names = getattr(task, "classes", ["no", "yes"])
        assert total.classes == {n: int((joined == index).sum()) for index, n in enumerate(names)}
        assert sum(total.classes.values()) == total.pixels - total.ignored
    else:
        assert not total.classes
    if name == "depth":
        assert total.lowest == joined[0][known].min().item() and total.highest == joined.max().item()
    else:
        assert (total.lowest, total.highest) == (math.inf, -math.inf)


def test_a_class_that_no_label_holds_is_counted_as_none():
    task = create_task("semseg", classes=["background", "object"])
    masks = torch.tensor([[[0, 255], [0, 0]]], dtype=torch.uint8)
    assert task.statistics(masks) == LabelStatistics(1, 0, 4, 1, {"background": 3, "object": 0})
    assert LabelStatistics().ignored_share == 0
