"""Features as colours: the components against NumPy's SVD, the features against the modules' own outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from looked_at import KINDS, TASKS, build, photo

from pamm.data.transforms import normalize
from pamm.drawing.sheet import Subject
from pamm.look import LookError
from pamm.look.features import (
    FeatureMap,
    color_features,
    feature_figure,
    fit_components,
    look_at_features,
    principal_components,
    read_features,
    shares_text,
)
from pamm.prediction import Predictor
from pamm.prediction.predictor import pad


@pytest.mark.parametrize("shape", [(200, 12), (9, 40), (30, 30)], ids=str)
def test_components_equal_the_singular_value_decomposition(shape):
    features = np.random.default_rng(0).normal(size=shape) * np.linspace(3, 0.1, shape[1]) + 5
    found = principal_components(features)
    _, singular, axes = np.linalg.svd(features - features.mean(0), full_matrices=False)
    np.testing.assert_allclose(found.shares, (singular**2 / (singular**2).sum())[:3], rtol=1e-8)
    for axis, expected in zip(found.axes, axes, strict=False):
        assert axis[np.abs(axis).argmax()] > 0
        np.testing.assert_allclose(axis, expected * np.sign(expected @ axis), atol=1e-7)
    scores = found.project(features)
    np.testing.assert_allclose(np.cov(scores.T, bias=True), np.diag(singular[:3] ** 2 / len(features)), atol=1e-7)
    assert np.array_equal(principal_components(features.copy()).axes, found.axes)


@pytest.mark.parametrize(
    ("features", "rank"),
    [
        (np.ones((5, 4)), 0),
        (np.ones((1, 4)), 0),
        (np.arange(8.0)[:, None] * np.ones(6), 1),
        (np.arange(5.0)[:, None], 1),
    ],
    ids=["constant", "one token", "one direction", "one channel"],
)
def test_directions_without_variance_are_zero(features, rank):
    found = principal_components(features)
    assert found.axes.shape == (3, features.shape[1]) and np.isfinite(found.axes).all()
    assert (found.shares > 0).sum() == rank and found.shares.sum() == pytest.approx(min(rank, 1))
    assert not found.axes[rank:].any()


@pytest.mark.parametrize(
    "features", [np.full((4, 3), np.nan), np.zeros((0, 3)), np.zeros(4)], ids=["nan", "none", "flat"]
)
def test_senseless_features_are_told(features):
    with pytest.raises(LookError, match=r"finite features of shape \(tokens, d\)"):
        principal_components(features)


STAGES = {
    "pamm": (["stage 1", "stage 2", "fused"], lambda m: m.decoder.pame, lambda y: y[0]),
    "baseline": (["stage 1", "stage 2", "fused"], lambda m: m.decoder.local, lambda y: y[0]),
    "one stage": (["stage 1"], lambda m: m.decoder.pame, lambda y: y[0]),
    "pamm-released": (["stage 1", "stage 2", "fused"], lambda m: m.decoder.stages, lambda y: torch.cat(y)),
    "mtmamba": (["stage 1", "stage 2", "stage 3"], lambda m: m.decoder.stages, lambda y: y[:, 0].movedim(-1, 1)),
    "mtmamba++": (["stage 1", "stage 2", "stage 3"], lambda m: m.decoder.stages, lambda y: y[:, 0].movedim(-1, 1)),
}


@pytest.mark.parametrize("kind", STAGES)
def test_features_are_what_leaves_the_modules(kind):
    """On an image that is padded: 60×90 in a frame of multiples of the patch."""
    model, image = build(kind), photo(60, 90)
    found = read_features(Predictor(model), image)
    rows, stages, one_image = STAGES[kind]
    assert list(found) == rows and all(list(columns) == ["backbone", *TASKS] for columns in found.values())
    frame, top, left = pad(normalize(image.transpose(2, 0, 1))[None], model.backbone.output_stride)
    with torch.no_grad():
        general = model.backbone(frame)
        features, outputs = None, {}
        for s, stage in enumerate(stages(model)):
            stage.register_forward_hook(lambda module, inputs, output, s=s: outputs.update({s: output}))
        features = model.decoder(general)
    for s, output in outputs.items():
        for task, own in zip(TASKS, one_image(output), strict=True):
            same(found[f"stage {s + 1}"][task].values, own)
        entering = general[-2 - s] if "mtmamba" in kind else general[s]
        same(found[f"stage {s + 1}"]["backbone"].values, entering[0])
    for task in TASKS:
        same(found[rows[-1]][task].values, features[task][0])
    place = found[rows[0]]["depth"]
    height, width = frame.shape[-2:]
    assert place.rows == (top / height, (top + 60) / height) and place.columns == (left / width, (left + 90) / width)


def same(values: np.ndarray, expected: torch.Tensor) -> None:
    """Relative to the largest number: the predictor's network differs from the plain one by rounding."""
    expected = expected.permute(1, 2, 0).numpy()
    assert values.shape == expected.shape and np.abs(values - expected).max() <= 1e-5 * np.abs(expected).max()


def test_every_pixel_has_the_colour_of_its_token_and_padding_is_cut_off():
    """A frame of 4×6 tokens of 8 pixels, the image's 24×40 pixels begin at (4, 3)."""
    tokens = np.arange(24).reshape(4, 6)
    where = FeatureMap(np.zeros((4, 6, 2)), (4 / 32, 28 / 32), (3 / 48, 43 / 48))
    expected = np.repeat(np.repeat(tokens, 8, 0), 8, 1)[4:28, 3:43]
    assert np.array_equal(where.cut_out(np.stack([tokens] * 3, -1), (24, 40))[..., 0], expected)


def test_tokens_of_the_padding_are_left_out():
    where = FeatureMap(np.zeros((4, 4, 2)), (0.2, 0.8), (0.0, 1.0))
    assert where.inside().tolist() == [[False] * 4, [True] * 4, [True] * 4, [False] * 4]
    thin = FeatureMap(np.zeros((4, 1, 2)), (0.49, 0.51), (0.0, 1.0))
    assert thin.inside().sum() == 1


def maps(seed: int) -> dict:
    random = np.random.default_rng(seed)
    whole = (0.0, 1.0), (0.0, 1.0)
    columns = {name: FeatureMap(random.normal(size=(4, 5, d)) + k, *whole) for k, (name, d) in enumerate(SIZES.items())}
    return {"stage 1": columns}


SIZES = {"backbone": 7, "semseg": 6, "depth": 6}


def test_one_pca_per_task_or_one_for_all_tasks():
    images = [maps(0), maps(1)]
    own, shared = fit_components(images, "per-task"), fit_components(images, "shared")

    def tokens(*names):
        return np.concatenate([m["stage 1"][name].values.reshape(-1, SIZES[name]) for name in names for m in images])

    for name in SIZES:
        np.testing.assert_allclose(own["stage 1", name].axes, principal_components(tokens(name)).axes)
    assert shared["stage 1", "semseg"] is shared["stage 1", "depth"]
    both = principal_components(tokens("semseg", "depth"))
    np.testing.assert_allclose(np.abs(shared["stage 1", "depth"].axes), np.abs(both.axes), atol=1e-9)
    np.testing.assert_allclose(shared["stage 1", "backbone"].axes, own["stage 1", "backbone"].axes)


@pytest.mark.parametrize("sharing", ["per-task", "shared"])
def test_one_colour_is_one_feature_wherever_the_pca_is_the_same(sharing):
    """An image of the first one's tokens in another order has the first one's colours in that order."""
    first = maps(0)
    turned = {
        "stage 1": {name: FeatureMap(m.values[::-1, ::-1], m.rows, m.columns) for name, m in first["stage 1"].items()}
    }
    images = [first, turned]
    colours = color_features(images, fit_components(images, sharing))
    for key, values in colours[0].items():
        assert values.shape == (4, 5, 3) and values.min() == 0 and values.max() <= 1
        np.testing.assert_allclose(colours[1][key], values[::-1, ::-1])
    reached = [max(values[..., c].max() for values in colours[0].values()) for c in range(3)]
    assert reached == [1, 1, 1]


def test_components_without_variance_are_grey():
    flat = {"stage 1": {"backbone": FeatureMap(np.ones((2, 2, 4)), (0.0, 1.0), (0.0, 1.0))}}
    assert (color_features([flat], fit_components([flat]))[0]["stage 1", "backbone"] == 0.5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_figures_of_images_of_several_sizes(kind):
    subjects = [Subject(f"{n}", photo(*size)) for n, size in enumerate([(64, 96), (50, 30), (9, 300)])]
    images = [subject.image for subject in subjects]
    look = look_at_features(Predictor(build(kind)), images)
    column = 80 + 3  # a tile and the gap beside it
    for number in range(3):
        three = feature_figure({"m": look}, subjects, number, TASKS, tile=80)
        one = feature_figure({"m": look}, subjects, number, TASKS[:1], tile=80)
        assert (
            three.width - one.width == 2 * column or number == 1
        )  # a narrow image's columns are as wide as their names
    rows = len(look.maps[0])
    once, twice = (
        feature_figure(models, subjects, 0, TASKS, tile=80) for models in ({"m": look}, {"m": look, "n": look})
    )
    assert twice.height - once.height == rows * (53 + 14 + 3)  # tile, the line of its note, gap


def test_chosen_rows_and_an_unknown_one():
    predictor = Predictor(build("pamm"))
    assert list(look_at_features(predictor, [photo(64, 96)], rows=["fused"]).maps[0]) == ["fused"]
    with pytest.raises(LookError, match="--stages: no '7' in this model, which has 1, 2, fused"):
        look_at_features(predictor, [photo(64, 96)], rows=["stage 7"])


def test_shares_are_told_in_percent():
    assert shares_text(principal_components(np.diag([2.0, 1.0, 1.0]))).endswith(" %")
