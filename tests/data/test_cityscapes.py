"""Cityscapes: every rule of the packaging, labels of twice the network's size, and every way in which the folder can be wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.packages import make_cityscapes, snapshot, write_png
from pamm.config.experiment import DataConfig, Experiment, ModelConfig, TaskConfig, TrainConfig
from pamm.config.recipes import get_recipe
from pamm.data import DataError, collate, dataset_options, open_dataset
from pamm.data.inspect import inspect_dataset
from pamm.data.transforms import EvalTransform, TrainTransform, normalize
from pamm.models.saved import load_model
from pamm.tasks import create_task
from pamm.training.run import train
from tiny import MTMAMBA, SWIN

EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
FIRST = "aachen/aachen_000000_000019"


@pytest.fixture
def root(tmp_path):
    make_cityscapes(tmp_path / "cityscapes_all")
    return tmp_path / "cityscapes_all"


def config_of(root, **changes):
    return DataConfig(
        **{"name": "cityscapes", "root": str(root), "size": (32, 64), "label_size": (64, 128), "scale": (1.0, 1.0)}
        | changes
    )


def tasks_of(config, names=("semseg", "depth")):
    options = dataset_options(config)
    return {name: create_task(name, **options[name]) for name in names}


def open_split(root, split="train", names=("semseg", "depth")):
    config = config_of(root)
    return open_dataset(config, split, tasks_of(config, names))


def stored(root, folder, suffix, split="train"):
    return np.asarray(Image.open(root / folder / split / f"{FIRST}{suffix}"))


def test_labels_follow_the_packaging(root):
    before = snapshot(root)
    dataset = open_split(root)
    assert list(dataset.ids) == [f"{c}/{c}_{n:06d}_000019" for c in ("aachen", "ulm") for n in (0, 1)]
    sample = dataset[0]
    assert sample.id == FIRST and sample.size == (64, 128)
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0), stored(root, "leftImg8bit", "_leftImg8bit.png"))
    ids = stored(root, "gtFine", "_gtFine_labelIds.png")
    expected = np.full_like(ids, 255)
    for index, label_id in enumerate(EVALUATED):
        expected[ids == label_id] = index
    np.testing.assert_array_equal(sample.labels["semseg"][0], expected)
    raw = stored(root, "disparity", "_disparity.png").astype(float)
    disparity = np.where((raw > 0) & (expected != 10), (raw - 1) / 256, 0)  # class 10: sky
    assert (expected[4:] == 10).any() and (disparity > 80).any()
    np.testing.assert_allclose(sample.labels["depth"][0], disparity, rtol=1e-6)
    for name, label in sample.labels.items():
        assert label.dtype == dataset.tasks[name].label_dtype
    assert snapshot(root) == before


def test_unknown_disparity_and_the_sky_are_not_trained_on_nor_measured(root):
    dataset = open_split(root)
    task, label = dataset.tasks["depth"], dataset[0].labels["depth"][None]
    unknown = torch.from_numpy(stored(root, "disparity", "_disparity.png").astype(np.int64) == 0)
    sky = torch.from_numpy(stored(root, "gtFine", "_gtFine_labelIds.png") == 23)
    assert unknown.any() and sky.any()
    logits = torch.zeros(1, 1, 64, 128, requires_grad=True)
    task.loss(logits, label).backward()
    assert torch.equal(logits.grad[0, 0] == 0, unknown | sky)
    metric = task.metric()
    metric.update(label + 1e6 * (label == 0), label)
    assert metric.compute()["RMSE"] == 0


def test_disparities_of_80_and_more_are_trained_on_and_not_measured(root):
    dataset = open_split(root)
    task, label = dataset.tasks["depth"], dataset[0].labels["depth"][None]
    far = (label > 0) & (label < 80)
    metric = task.metric()
    metric.update(label + 3.0 * far + 1e3 * (label >= 80), label)
    assert metric.compute()["RMSE"].item() == pytest.approx(3.0, rel=1e-5)
    assert task.counts(label)[0] > far.sum()


def test_disparity_grows_where_an_image_is_enlarged_and_saves_as_sixteen_bits(root, tmp_path):
    task = open_split(root).tasks["depth"]
    assert task.rescale(torch.tensor([[[3.0, 0.0]]]), 2.0).tolist() == [[[6.0, 0.0]]]
    suffix, content = task.label_file(np.array([[0.0, 1.5, 126.0]], np.float32))
    (tmp_path / f"a{suffix}").write_bytes(content)
    assert task.read(tmp_path / "a.png").tolist() == [[[0.0, 1.5, 126.0]]]
    near, far = create_task("depth").draw(np.array([[1.0, 9.0]]))[0]
    assert np.array_equal(task.draw(np.array([[9.0, 1.0]]))[0], [near, far])
    assert create_task("depth", **task.options()).options() == task.options()


@pytest.mark.parametrize("training", [False, True])
def test_the_network_sees_the_image_at_half_the_labels_size(root, training):
    """Pillow's bilinear resizing, then ImageNet's mean and deviation; labels stay as they are."""
    dataset = open_split(root)
    config = config_of(root, flip=0.0, color=False)
    sample = (
        TrainTransform(dataset.tasks, config)(dataset[0], 0, 0)
        if training
        else EvalTransform(dataset.tasks, config)(dataset[0])
    )
    picture = Image.open(root / "leftImg8bit" / "train" / f"{FIRST}_leftImg8bit.png").resize((64, 32), Image.BILINEAR)
    assert torch.equal(sample.image, normalize(np.asarray(picture).transpose(2, 0, 1)))
    for name, label in dataset[0].labels.items():
        assert torch.equal(sample.labels[name], label), name
    batch = collate([sample, sample], dataset.tasks)
    assert batch.image.shape == (2, 3, 32, 64) and batch.label_size == (64, 128)


def test_a_smaller_image_keeps_its_place_in_the_frame(root):
    dataset = open_split(root)
    config = config_of(root, label_size=(96, 160), size=(48, 80))
    sample = EvalTransform(dataset.tasks, config)(dataset[0])
    assert sample.image.shape == (3, 48, 80) and sample.labels["depth"].shape == (1, 96, 160)
    inside = torch.zeros(48, 80, dtype=torch.bool)
    inside[8:40, 8:72] = True
    assert torch.equal((sample.image != 0).any(0), inside)
    assert torch.equal(sample.labels["semseg"][:, 16:80, 16:144], dataset[0].labels["semseg"])
    with pytest.raises(DataError, match=r"64 x 128 does not fit into the frame of 48 x 128\. Set data\.label_size"):
        EvalTransform(dataset.tasks, config_of(root, label_size=(48, 128)))(dataset[0])


def test_the_parent_folder_is_a_root_too_and_any_subset_of_tasks_is_read(root):
    assert set(open_split(root.parent, "val", ["depth"])[0].labels) == {"depth"}


def test_labels_of_another_size_are_resized_nearest(root):
    ids = stored(root, "gtFine", "_gtFine_labelIds.png")
    write_png(root / "gtFine" / "train" / f"{FIRST}_gtFine_labelIds.png", ids[::2, ::2])
    write_png(
        root / "disparity" / "train" / f"{FIRST}_disparity.png", stored(root, "disparity", "_disparity.png")[::2, ::2]
    )
    labels = open_split(root)[0].labels
    assert labels["semseg"].shape == labels["depth"].shape == (1, 64, 128)
    assert torch.equal(labels["semseg"][:, ::2, ::2], labels["semseg"][:, 1::2, 1::2])


def lose(root, name):
    (root / name).unlink()


BROKEN = {
    "labels lost": (
        lambda r: lose(r, f"gtFine/train/{FIRST}_gtFine_labelIds.png"),
        rf"1 of the 4 ids in leftImg8bit/train have no file, e\.g\. gtFine/{FIRST}_gtFine_labelIds\.png",
    ),
    "disparity lost": (lambda r: (r / "disparity").rename(r / "d"), r"4 of the 4 ids .*disparity/"),
    "no images": (
        lambda r: (r / "leftImg8bit" / "train").rename(r / "t"),
        r"leftImg8bit/train holds no <city>/\*_leftImg8bit",
    ),
    "no such root": (lambda r: (r / "leftImg8bit").rename(r / "left"), "holds neither leftImg8bit/"),
    "colour label": (
        lambda r: write_png(r / f"gtFine/train/{FIRST}_gtFine_labelIds.png", np.zeros((64, 128, 3), np.uint8)),
        "expected one channel",
    ),
    "train ids in place of label ids": (
        lambda r: write_png(r / f"gtFine/train/{FIRST}_gtFine_labelIds.png", np.full((64, 128), 255, np.uint8)),
        "holds the value 255, expected label ids, 0 to 33; train ids",
    ),
    "8-bit disparity": (
        lambda r: write_png(r / f"disparity/train/{FIRST}_disparity.png", np.zeros((64, 128), np.uint8)),
        "expected a 16-bit grey PNG",
    ),
    "truncated image": (
        lambda r: (r / f"leftImg8bit/train/{FIRST}_leftImg8bit.png").write_bytes(b"\x89PNG"),
        "is not a whole picture",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_is_wrong_is_one_data_error(root, kind):
    damage, message = BROKEN[kind]
    damage(root)
    with pytest.raises(DataError, match=message):
        for name in ("semseg", "depth"):
            open_split(root, names=[name])[0]


def test_a_task_without_labels_is_named(root):
    with pytest.raises(DataError, match="no labels for task 'sal'; it has: semseg, depth"):
        open_dataset(config_of(root), "train", {"sal": create_task("sal")})


def test_inspection_tells_that_this_is_not_the_whole_data_set(root):
    train, val = inspect_dataset(config_of(root), deep=True)
    assert (train.images, val.images) == (4, 4) and train.problems == val.problems == []
    assert train.labels == {"semseg": 4, "depth": 4} and train.smallest == (64, 128)
    assert "2975 were published" in train.notes[0] and "500 were published" in val.notes[0]


def test_the_recipes_hold_the_published_settings():
    for name in ("cityscapes-mtmamba", "cityscapes-mtmamba-plus"):
        data = get_recipe(name).data
        assert (data.size, data.label_size, data.frame) == ((512, 1024), (1024, 2048), (1024, 2048))
        assert (data.scale, data.flip, data.color) == ((1.0, 1.0), 0.0, False)
        assert len(dataset_options(data)["semseg"]["classes"]) == 19


def test_a_run_compares_maps_at_the_labels_size(root, tmp_path):
    config = config_of(root, flip=0.0, color=False)
    run = Experiment(
        name="streets",
        tasks={"semseg": TaskConfig(), "depth": TaskConfig()},
        data=config,
        model=ModelConfig(SWIN, MTMAMBA),
        train=TrainConfig(steps=2, batch=2, workers=0, device="cpu", scheme="log_sum", eval_every=0),
    )
    result = train(run, tmp_path / "run", progress=False)
    assert "cityscapes val split, 4 images, frame 64×128 (seen at 32×64, centred" in result.protocol
    model, dataset = load_model(tmp_path / "run"), open_split(root, "val")
    metric, transform = model.tasks["depth"].metric(), EvalTransform(model.tasks, config)
    for index in range(4):
        sample = transform(dataset[index])
        with torch.no_grad():
            logits = model(sample.image[None], (64, 128))["depth"]
        assert logits.shape == (1, 1, 64, 128)
        metric.update(logits, sample.labels["depth"][None])
    assert result.row["depth"]["RMSE"] == pytest.approx(metric.compute()["RMSE"].item(), rel=1e-5)
