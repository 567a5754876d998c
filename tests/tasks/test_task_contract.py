"""What holds for every registered task."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
import zlib
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from task_cases import of_case, perfect_logits, random_label, random_logits, write_label

from data.packages import as_user
from pamm.tasks import TASKS, LabelError, NonFiniteError, Task, create_task
from pamm.tasks.task import nearest_index


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return create_task(request.param)


def scores(task: Task, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    metric = task.metric()
    for logits, label in batches:
        metric.update(logits, label)
    return {name: float(value) for name, value in metric.compute().items()}


def test_options_are_json_and_rebuild_the_task(task: Task) -> None:
    options = json.loads(json.dumps(task.options()))
    again = create_task(task.name, **(options | {"weight": 2.5}))
    assert again.options() == task.options() | {"weight": 2.5}
    assert again.channels == task.channels


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_impossible_weights_are_refused(task: Task, weight: float) -> None:
    with pytest.raises(ValueError, match=f"task '{task.name}': weight is {weight}, expected a number"):
        create_task(task.name, weight=weight)
    assert create_task(task.name, weight=0).weight == 0


def test_labels_are_png_files_or_others_the_task_reads(task: Task) -> None:
    assert task.suffixes[0] == ".png"
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in task.suffixes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_that_is_not_finite_has_no_score(task: Task, value: float, dtype: torch.dtype) -> None:
    label = random_label(task)
    logits = random_logits(task, label).to(dtype)
    logits[0, 0, 0, :2] = value
    metric = task.metric()
    with pytest.raises(NonFiniteError, match=rf"output for '{task.name}' is not finite: 2 of {logits.numel()} values"):
        metric.update(logits, label)
    assert all(not state.any() for state in metric.metric_state.values())


def test_nearest_neighbours_are_exact() -> None:
    for old, new in [(3, 7), (41, 100), (425, 1000), (560, 1679), (12_289, 24_577), (20_000_003, 17)]:
        assert nearest_index(old, new).tolist() == [i * old // new for i in range(new)]


def test_resampling_takes_the_nearest_neighbour_exactly(task: Task) -> None:
    label = random_label(task, batch=1, size=(12_289, 3))[0]
    rows, columns = [i * 12_289 // 24_577 for i in range(24_577)], [i * 3 // 7 for i in range(7)]
    assert torch.equal(task.resample(label, (24_577, 7)), label[:, rows][:, :, columns])


def test_perfect_prediction_has_the_perfect_score(task: Task) -> None:
    label = random_label(task)
    found = scores(task, [(perfect_logits(task, label), label)])
    perfect = of_case(task, "PERFECT")
    assert task.score in perfect
    for name, value in perfect.items():
        assert found[name] == pytest.approx(value, abs=of_case(task, "SLACK")), name


def test_any_order_and_split_gives_the_same_scores(task: Task) -> None:
    label = random_label(task, batch=6)
    logits = random_logits(task, label)
    whole = scores(task, [(logits, label)])
    singles = scores(task, [(logits[i : i + 1], label[i : i + 1]) for i in (3, 5, 0, 4, 2, 1)])
    first, second = task.metric(), task.metric()
    first.update(logits[:1], label[:1])
    second.update(logits[1:], label[1:])
    first.merge_state(second)
    merged = {name: float(value) for name, value in first.compute().items()}
    assert not any(np.isnan(v) for v in whole.values())
    for name, value in whole.items():
        assert singles[name] == pytest.approx(value, rel=1e-12), name
        assert merged[name] == pytest.approx(value, rel=1e-12), name


def test_a_shard_without_images_or_valid_pixels_adds_nothing(task: Task) -> None:
    label = random_label(task, batch=2)
    logits = random_logits(task, label)
    ignored = torch.full_like(label, task.ignore)
    assert scores(task, [(logits, label), (logits, ignored)]) == scores(task, [(logits, label)])
    empty = task.metric()
    used = task.metric()
    used.update(logits, label)
    used.merge_state(empty)
    assert {k: float(v) for k, v in used.compute().items()} == scores(task, [(logits, label)])


def test_scores_of_nothing_are_nan(task: Task) -> None:
    label = random_label(task, batch=1)
    ignored = torch.full_like(label, task.ignore)
    for found in (scores(task, []), scores(task, [(random_logits(task, label), ignored)])):
        assert task.score in found
        assert all(np.isnan(value) for value in found.values())


def test_metric_can_be_reset_copied_and_pickled(task: Task) -> None:
    label = random_label(task)
    logits = random_logits(task, label)
    metric = task.metric()
    metric.update(logits, label)
    expected = {name: float(value) for name, value in metric.compute().items()}
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert {name: float(value) for name, value in other.compute().items()} == expected
    metric.reset()
    metric.update(logits, label)
    assert {name: float(value) for name, value in metric.compute().items()} == expected


def test_metric_states_are_exact_types_and_summed(task: Task) -> None:
    metric = task.metric()
    states = metric.metric_state
    assert states
    assert all(state.dtype in (torch.int64, torch.float64) for state in states.values())
    assert all(metric._reductions[name] is not None for name in states)


def test_inputs_are_not_changed(task: Task) -> None:
    label = random_label(task)
    logits = random_logits(task, label)
    logits_before, label_before = logits.clone(), label.clone()
    metric = task.metric()
    metric.update(logits, label)
    metric.compute()
    task.loss(logits, label)
    task.decode(logits)
    for i in range(len(label)):
        task.flip(label[i])
        task.rescale(label[i], 1.7)
        task.finish(label[i])
    assert torch.equal(logits, logits_before)
    assert torch.equal(label, label_before)


def test_all_ignored_has_zero_loss_with_a_gradient_path(task: Task) -> None:
    label = task.missing((12, 16))[None].repeat(2, 1, 1, 1)
    logits = random_logits(task, label).requires_grad_()
    loss = task.loss(logits, label)
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(logits.grad) == 0


def test_ignored_pixels_get_no_gradient_and_valid_ones_do(task: Task) -> None:
    label = random_label(task)
    logits = random_logits(task, label).requires_grad_()
    task.loss(logits, label).backward()
    touched = (logits.grad != 0).any(1, keepdim=True)
    assert torch.equal(touched, task.valid(label))


def test_parts_with_joint_counts_add_up_to_the_joined_loss(task: Task) -> None:
    label = random_label(task, batch=4)
    label[0] = task.ignore
    label[2, :, 5:] = task.ignore
    logits = random_logits(task, label).double().requires_grad_()
    joined = task.loss(logits, label)
    (whole,) = torch.autograd.grad(joined, logits)
    parts = (slice(0, 1), slice(1, 3), slice(3, 4))
    counts = sum(task.counts(label[part]) for part in parts)
    assert torch.equal(counts, task.counts(label))
    total = sum(task.loss(logits[part], label[part], counts) for part in parts)
    (split,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(total, joined, rtol=1e-12, atol=0)
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-15)


def test_gradient_of_the_loss_equals_finite_differences(task: Task) -> None:
    label = random_label(task, batch=2, size=(3, 4))
    logits = random_logits(task, label).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: task.loss(x, label), logits)


def test_loss_is_computed_in_float32_under_autocast(task: Task) -> None:
    label = random_label(task)
    logits = random_logits(task, label).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.loss(logits, label)
    assert loss.dtype == torch.float32
    assert loss.item() == task.loss(logits.float(), label).item()
    half, full = scores(task, [(logits, label)]), scores(task, [(logits.float(), label)])
    assert half == full


def test_flip_twice_is_the_identity(task: Task) -> None:
    label = random_label(task, batch=1)[0]
    once = task.flip(label)
    assert not torch.equal(once, label)
    assert torch.equal(task.flip(once), label)
    assert torch.equal(task.valid(once), task.valid(label).flip(-1))


def test_labels_keep_their_type_and_their_ignored_pixels(task: Task) -> None:
    label = random_label(task, batch=1)[0]
    for moved in (task.flip(label), task.rescale(label, 0.6), task.finish(label), task.resample(label, (24, 36))):
        assert moved.dtype == task.label_dtype
        assert torch.equal(task.valid(moved).sum(), task.valid(label).sum())
    missing = task.missing((5, 6))
    assert missing.shape == (task.label_channels, 5, 6) and missing.dtype == task.label_dtype
    for moved in (task.flip(missing), task.rescale(missing, 0.6), task.finish(missing)):
        assert not task.valid(moved).any()


def test_decode_of_perfect_logits_is_the_truth(task: Task) -> None:
    label = random_label(task)
    predicted = task.decode(perfect_logits(task, label))
    for i in range(len(label)):
        valid = task.valid(label[i])[0]
        truth = task.truth(label[i])
        assert predicted[i].shape == truth.shape
        torch.testing.assert_close(predicted[i][valid].double(), truth[valid].double(), rtol=0, atol=1e-4)


def test_saved_prediction_reads_back(task: Task, tmp_path) -> None:
    label = random_label(task, batch=1)
    prediction = task.decode(random_logits(task, label))[0].numpy()
    back = task.read(write_label(task, prediction, tmp_path / "label"))
    assert back.shape == (task.label_channels, *label.shape[-2:]) and back.dtype == task.label_dtype
    step = of_case(task, "STEP")
    if step is None:
        assert np.array_equal(back[0].numpy() == 1, prediction >= 0.5)
    else:
        assert np.abs(task.truth(back).numpy() - prediction.astype(float)).max() <= step + 1e-6


def test_picture_shows_the_prediction_and_greys_the_rest(task: Task) -> None:
    label = random_label(task, batch=1)
    prediction = task.decode(random_logits(task, label))[0].numpy()
    valid = task.valid(label)[0, 0].numpy()
    whole = task.draw(prediction)
    picture = task.draw(prediction, valid=valid, reference=task.truth(label[0]).numpy())
    for image in (whole, picture):
        assert image.shape == (*label.shape[-2:], 3) and image.dtype == np.uint8
    assert len(np.unique(whole.reshape(-1, 3), axis=0)) > 1
    assert (picture[~valid] == 128).all()
    assert (picture[valid] != 128).any()


def test_a_label_that_may_not_be_read_is_not_to_be_written_again(task: Task, tmp_path) -> None:
    folder = tmp_path / "labels"
    folder.mkdir()
    for suffix in task.suffixes:
        (folder / f"label{suffix}").touch()
    with as_user(folder):
        for path in folder.iterdir():
            path.chmod(0)
            with pytest.raises(LabelError, match=r"label\.\w+ may not be read: change the permissions"):
                task.read(path)


@pytest.mark.parametrize("damage", ["absent", "folder", "empty", "text", "truncated", "jpeg", "rgba"])
def test_bad_files_are_label_errors_that_name_the_file(task: Task, damage: str, tmp_path) -> None:
    path = tmp_path / "label.png"
    good = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 4), np.uint8))
    if damage == "folder":
        path.mkdir()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not an image")
    elif damage == "jpeg":
        good.convert(of_case(task, "MODE")).save(path, format="JPEG")
    elif damage == "rgba":
        good.save(path)
    elif damage == "truncated":
        label = random_label(task, batch=1, size=(64, 64))
        write_label(task, task.decode(random_logits(task, label))[0].numpy(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(LabelError, match=r"label\.png"):
        task.read(path)


def test_an_implausibly_large_file_is_refused_before_it_is_decoded(task: Task, tmp_path) -> None:
    path = tmp_path / "label.png"
    label = random_label(task, batch=1, size=(8, 8))
    write_label(task, task.decode(random_logits(task, label))[0].numpy(), path)
    data = bytearray(path.read_bytes())
    for side in (16_000, 60_000):
        data[16:24] = side.to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        path.write_bytes(data)
        with pytest.raises(LabelError, match="implausibly large"):
            task.read(path)


def test_labels_of_real_images(task: Task, shared, tmp_path) -> None:
    folder = shared / "data" / "mosaic" / "val" / task.name
    if not folder.is_dir():
        pytest.skip(f"no labels of {task.name} among the real images")
    labels = map(task.read, sorted(folder.iterdir()))
    for label in islice((label for label in labels if task.valid(label).any()), 2):
        assert label.dtype == task.label_dtype
        again = task.read(write_label(task, task.truth(label).numpy(), tmp_path / "again"))
        difference = (again.double() - label.double()).abs()
        assert difference[task.valid(label).expand_as(label)].max() <= 1e-6
        found = scores(task, [(perfect_logits(task, label[None]), label[None])])[task.score]
        assert found == pytest.approx(perfect_score(task, label), abs=max(of_case(task, "SLACK"), 1e-4))


def perfect_score(task: Task, label: torch.Tensor) -> float:
    """A perfect prediction's score on one image: classes absent from it count as 0 in mIoU."""
    best = of_case(task, "PERFECT")[task.score]
    if task.score != "mIoU":
        return best
    return best * len(label[task.valid(label)].unique()) / task.channels


def test_the_task_package_needs_no_extra() -> None:
    code = (
        "import sys, pamm.tasks; "
        "print([m for m in ('torchmetrics', 'scipy', 'skimage', 'lightning', 'lightning_fabric') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_image_alone_has_a_score_that_tells_good_from_bad(task: Task) -> None:
    label = random_label(task, batch=1)
    good, bad = (task.score_image(x, label) for x in (perfect_logits(task, label), random_logits(task, label)))
    assert good == pytest.approx(100 if task.higher_is_better else 0, abs=1e-4)
    assert good > bad if task.higher_is_better else good < bad
    assert task.image_score
    nothing = torch.full_like(label, task.ignore)
    assert math.isnan(task.score_image(random_logits(task, label), nothing))
