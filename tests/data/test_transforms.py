"""Transforms against the definition of each step."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from pamm.config.experiment import DataConfig
from pamm.config.strict import ConfigError
from pamm.data import DataError, Sample, transforms
from pamm.data.transforms import (
    MEAN,
    STD,
    EvalTransform,
    TrainTransform,
    bilinear,
    frame,
    normalize,
    photometric_distortion,
    seen,
)
from pamm.tasks import create_task

STILL = DataConfig(size=(64, 96), scale=(1.0, 1.0), flip=0.0, color=False)
NAMES = ("semseg", "edge", "depth", "normals")


def make_tasks(*names):
    return {name: create_task(name) for name in names or NAMES}


def make_sample(height=64, width=96, seed=0):
    """Random image and labels; the depth label numbers the pixels."""
    random = np.random.default_rng(seed)
    labels = {
        "semseg": torch.from_numpy(random.integers(0, 21, (1, height, width), dtype=np.uint8)),
        "edge": torch.from_numpy(random.integers(0, 2, (1, height, width), dtype=np.uint8)),
        "depth": torch.arange(1, height * width + 1).reshape(1, height, width).float(),
        "normals": torch.from_numpy(random.uniform(-1, 1, (3, height, width)).astype(np.float32)),
    }
    image = torch.from_numpy(random.integers(0, 256, (3, height, width), dtype=np.uint8))
    return Sample("a", image, labels, (height, width))


def denormalize(image):
    return (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255


class Script:
    """Stands in for a random generator: hands out the numbers listed."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def integers(self, *bounds):
        return self.numbers.pop(0)

    uniform = random = integers


@pytest.mark.parametrize("contrast_first", [0, 1])
def test_photometric_distortion_equals_its_definition_in_opencv(contrast_first):
    """Bit for bit, as MMSegmentation writes it; OpenCV rounds a colour by up to one level differently on another processor."""
    image = np.random.default_rng(0).integers(0, 256, (200, 256, 3), dtype=np.uint8)

    def convert(values, alpha=1.0, beta=0.0):
        return np.clip(values.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    expected = convert(image, beta=20.0)
    if contrast_first:
        expected = convert(expected, alpha=1.3)
    hsv = cv2.cvtColor(expected, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = convert(hsv[..., 1], alpha=0.7)
    expected = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    hsv = cv2.cvtColor(expected, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) - 11) % 180
    expected = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_first:
        expected = convert(expected, alpha=1.3)
    contrast = [1, 1.3]
    numbers = [1, 20.0, contrast_first, *contrast[: 2 * contrast_first], 1, 0.7, 1, -11, *contrast]
    result = photometric_distortion(image.transpose(2, 0, 1), Script(*numbers)).transpose(1, 2, 0)
    np.testing.assert_array_equal(result, expected)


def test_photometric_distortion_without_luck_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (3, 20, 20), dtype=np.uint8)
    np.testing.assert_array_equal(photometric_distortion(image, Script(0, 1, 0, 0, 0)), image)


@pytest.mark.parametrize("factor", [0.5, 0.77, 1.0, 1.33, 1.999])
def test_zoom_is_bilinear_also_in_a_window(factor):
    """Position (i + ½)·old/new − ½ of the image, at its edge that of the last pixel; no antialiasing."""
    image = np.random.default_rng(0).integers(0, 256, (75, 101, 3), dtype=np.uint8)
    size = (int(75 * factor), int(101 * factor))

    def weights(new, old):
        position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old)))

    expected = np.einsum("yi,xj,ijc->yxc", weights(size[0], 75), weights(size[1], 101), image.astype(float))
    result = bilinear(image.transpose(2, 0, 1), size, (5, 9, 20, 30)).transpose(1, 2, 0)
    np.testing.assert_allclose(result, expected[5:25, 9:39], atol=1e-3)


def test_zoom_moves_labels_like_opencv_and_divides_depth():
    sample = make_sample(60, 80)
    config = replace(STILL, scale=(1.37, 1.37), size=(int(60 * 1.37), int(80 * 1.37)))
    result = TrainTransform(make_tasks(), config)(sample, 0, 0)
    for name in ("semseg", "edge", "depth"):
        expected = cv2.resize(sample.labels[name][0].numpy(), config.size[::-1], interpolation=cv2.INTER_NEAREST)
        expected = expected / np.float32(1.37) if name == "depth" else expected
        np.testing.assert_allclose(result.labels[name][0], expected, rtol=1e-6)
    assert result.size == (60, 80)


def test_flip_mirrors_everything_and_turns_the_normals_x():
    sample = make_sample()
    result = TrainTransform(make_tasks(), replace(STILL, flip=1.0))(sample, 0, 0)
    torch.testing.assert_close(denormalize(result.image), sample.image.flip(-1).float(), atol=1e-3, rtol=0)
    assert torch.equal(result.labels["semseg"], sample.labels["semseg"].flip(-1))
    mirrored = sample.labels["normals"].flip(-1)
    torch.testing.assert_close(result.labels["normals"], mirrored * torch.tensor([-1.0, 1, 1])[:, None, None])


def test_crop_takes_the_same_window_of_image_and_labels():
    sample = make_sample(200, 300)
    sample.image[:] = (sample.labels["depth"] % 251).byte()
    corners = set()
    for index in range(20):
        result = TrainTransform(make_tasks(), STILL)(sample, 0, index)
        depth = result.labels["depth"]
        corners.add(divmod(int(depth[0, 0, 0]) - 1, 300))
        assert torch.equal(depth[0, 1:] - depth[0, :-1], torch.full((63, 96), 300.0))
        torch.testing.assert_close(denormalize(result.image), (depth % 251).expand(3, -1, -1), atol=1e-3, rtol=0)
    assert len(corners) > 15
    assert max(top for top, _ in corners) <= 200 - 64 and max(left for _, left in corners) <= 300 - 96


def test_crop_is_redrawn_while_one_class_dominates():
    label = torch.full((1, 64, 960), 3, dtype=torch.uint8)
    label[..., 700:] = 5

    def crop(task, *lefts):
        """Left edge of the crop that stays, and the number of draws, where the generator hands out `lefts`."""
        script = Script(*(number for left in lefts for number in (0, left)))
        box = TrainTransform(make_tasks(task), STILL)._draw_box((64, 960), {task: label}, script)
        return box[1], len(lefts) - len(script.numbers) // 2

    mixed, dominated = 650, 0
    assert crop("semseg", mixed, dominated) == (mixed, 1)
    assert crop("semseg", dominated, dominated, mixed, dominated) == (mixed, 3)
    assert crop("semseg", 628, 629, 630) == (629, 2)  # 72 and 71 of its 96 columns are class 3
    assert crop("semseg", *range(20)) == (10, 11)
    assert crop("human_parts", dominated, mixed) == (dominated, 1)


def test_crop_without_class_label_needs_none():
    sample = make_sample(200, 300)
    del sample.labels["semseg"]
    assert TrainTransform(make_tasks(), STILL)(sample, 0, 0).labels.keys() == {"edge", "depth", "normals"}


def test_same_seed_epoch_and_index_give_the_same_bits_whatever_the_global_state():
    config = DataConfig(size=(64, 96))
    transform = TrainTransform(make_tasks(), config, seed=7)
    results = []
    for seed in (0, 1):
        np.random.seed(seed)
        torch.manual_seed(seed)
        results.append(transform(make_sample(100, 140), 3, 5))
    assert torch.equal(results[0].image, results[1].image)
    assert all(torch.equal(results[0].labels[name], results[1].labels[name]) for name in NAMES)
    for other in (transform(make_sample(100, 140), 4, 5), transform(make_sample(100, 140), 3, 6)):
        assert not torch.equal(other.image, results[0].image)


def test_padding_is_centred_and_ignored():
    tasks, sample = make_tasks(), make_sample(61, 93)
    config = replace(STILL, size=(64, 96))
    result = EvalTransform(tasks, config)(sample)
    top, left, height, width = frame(sample.size, config)
    assert (top, left, height, width) == (1, 1, 61, 93)
    inside = np.s_[:, top : top + height, left : left + width]
    torch.testing.assert_close(denormalize(result.image)[inside], sample.image.float(), atol=1e-3, rtol=0)
    outside = torch.ones(1, 64, 96, dtype=torch.bool)
    outside[inside] = False
    assert (result.image[outside.expand(3, -1, -1)] == 0).all()
    for name, task in tasks.items():
        assert torch.equal(result.labels[name][inside], sample.labels[name])
        assert (result.labels[name][outside.expand_as(result.labels[name])] == task.ignore).all()
    assert result.size == (61, 93)


def test_a_small_training_image_is_padded_like_an_evaluation_image():
    sample = make_sample(50, 70)
    train, evaluation = (t(make_tasks(), STILL) for t in (TrainTransform, EvalTransform))
    assert torch.equal(train(sample, 0, 0).image, evaluation(sample).image)


def test_no_part_pixel_left_ignores_the_crop():
    sample = make_sample()
    sample.labels = {"human_parts": torch.zeros(1, 64, 96, dtype=torch.uint8)}
    result = EvalTransform(make_tasks("human_parts"), STILL)(sample)
    assert (result.labels["human_parts"] == 255).all()


def test_larger_image_than_the_frame_is_an_error_with_remedy():
    with pytest.raises(DataError, match=r"a: an image of 65 x 80 .* frame of 64 x 96.* data\.size .* data\.fit"):
        EvalTransform(make_tasks(), STILL)(make_sample(65, 80))


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(128, 96, (64, 48)), (100, 1000, (10, 96)), (30, 40, (30, 40))]
)
def test_fit_shrinks_larger_images_only_and_keeps_values(height, width, expected):
    sample, config = make_sample(height, width), replace(STILL, fit=True)
    result = EvalTransform(make_tasks(), config)(sample)
    top, left, *size = frame(sample.size, config)
    assert tuple(size) == expected
    inside = np.s_[:, top : top + size[0], left : left + size[1]]
    depth = sample.labels["depth"][0].numpy()
    np.testing.assert_array_equal(
        result.labels["depth"][inside][0], cv2.resize(depth, expected[::-1], interpolation=cv2.INTER_NEAREST)
    )
    if (height, width) == (128, 96):
        expected_image = sample.image.float().mean((1, 2))
        torch.testing.assert_close(denormalize(result.image)[inside].mean((1, 2)), expected_image, atol=1, rtol=0)
        assert denormalize(result.image)[inside].std() < 0.7 * sample.image.float().std()
    assert result.size == (height, width)
    trained = TrainTransform(make_tasks(), config)(sample, 0, 0)
    assert torch.equal(trained.image, result.image) and torch.equal(trained.labels["depth"], result.labels["depth"])


def test_senseless_zoom_is_a_config_error():
    with pytest.raises(ConfigError, match=r"data\.scale"):
        TrainTransform(make_tasks(), replace(STILL, scale=(2.0, 0.5)))


@pytest.mark.parametrize(
    ("label_size", "fit", "size"),
    [
        (None, True, (120, 100)),
        (None, False, (50, 61)),
        ((128, 192), False, (101, 150)),
        ((128, 192), True, (300, 151)),
    ],
)
def test_where_an_image_lies_in_frame_and_network_and_its_labels_as_they_were(label_size, fit, size):
    config = replace(STILL, label_size=label_size, fit=fit)
    tasks = make_tasks("semseg", "human_parts")
    white = torch.full((3, *size), 255, dtype=torch.uint8)
    labels = {name: torch.zeros((1, *size), dtype=torch.uint8) for name in tasks}
    sample = EvalTransform(tasks, config, original=True)(Sample("a", white, labels, size))
    assert torch.equal(sample.original["semseg"], labels["semseg"])
    assert (sample.original["human_parts"] == 255).all()  # a person in no pixel, here as in the frame
    top, left, height, width = sample.box
    inside = torch.zeros(config.frame, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert torch.equal(sample.labels["semseg"][0] == 0, inside)
    top, left, height, width = seen(sample.box, config)
    inside = torch.zeros(config.size, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert torch.equal(sample.image[0] > 1, inside)
    assert EvalTransform(tasks, config)(Sample("a", white, labels, size)).original is None


def test_pixels_survive_normalisation():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8)
    np.testing.assert_array_equal(transforms.denormalize(normalize(pixels)), pixels.transpose(1, 2, 0))
