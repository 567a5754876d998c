"""The same numbers whatever torch's defaults are, from a network of any dtype, and for images of any size."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pamm.models.saved import load_model
from pamm.nn.group_norm import GroupNorm
from pamm.nn.joined import BatchError
from pamm.prediction import Maps, PredictError, Predictor
from prediction.networks import SYSTEMS, create, photo

OTHER = {torch.float64: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.06}
"""Dtype → how far its predictions may lie from float32's, relative to the largest logit."""

CONVERSIONS = {
    torch.float64: lambda model: model.double(),
    torch.float16: lambda model: model.half(),
    torch.bfloat16: lambda model: model.bfloat16(),
}


@pytest.fixture
def defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def assert_equal(maps: Maps, expected: Maps) -> None:
    for task, values in expected.items():
        assert values.dtype == maps[task].dtype
        np.testing.assert_array_equal(maps[task], values, err_msg=task)


@pytest.mark.parametrize("system", SYSTEMS)
def test_torchs_defaults_change_no_prediction(system, tmp_path, defaults):
    model, image = create(system), photo(50, 61)
    model.save_pretrained(tmp_path / "model")
    loaded = Predictor(tmp_path / "model", device="cpu")
    expected = loaded(image)
    for dtype in OTHER:
        torch.set_default_dtype(dtype)
        assert_equal(loaded(image), expected)
        late = Predictor(tmp_path / "model", device="cpu")
        assert_equal(late(image), expected)
        torch.set_default_dtype(torch.float32)
        assert_equal(late(image), expected)
    torch.set_default_device("meta")
    assert_equal(loaded(image), expected)
    assert_equal(Predictor(tmp_path / "model", device="cpu")(image), expected)
    assert next(load_model(tmp_path / "model").parameters()).device.type == "cpu"


@pytest.mark.parametrize("dtype", OTHER, ids=str)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_network_of_another_dtype_predicts_nearly_the_same(system, dtype):
    model = create(system)
    other = CONVERSIONS[dtype](copy.deepcopy(model))
    pixels, frame = photo(50, 61), torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    maps, expected = Predictor(other)(pixels), Predictor(model)(pixels)
    for task in ("depth", "normals", "sal", "edge"):
        scale = max(1, np.abs(expected[task]).max())
        error = np.abs(maps[task] - expected[task])  # of a normal whose logits are nearly 0 it may be anything
        assert np.quantile(error, 0.99) <= OTHER[dtype] * scale, task
    assert next(other.parameters()).dtype == dtype, "the given network was changed"
    for grad in (True, False):  # a gradient takes other paths
        with torch.set_grad_enabled(grad):
            exact = model(frame)
            for given in (frame, frame.to(dtype)):
                logits = other(given)
                for task, values in exact.items():
                    assert logits[task].dtype == torch.float32
                    error = (logits[task] - values).abs().max() / values.abs().max()
                    assert error <= OTHER[dtype], (task, error)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 500), (500, 1), (8, 8), (32, 33)], ids=str)
@pytest.mark.parametrize("system", SYSTEMS)
def test_an_image_of_any_size_is_predicted(system, size):
    """The least width that is allowed has groups of one channel: a map of one token has one value per group."""
    maps = Predictor(create(system), longest_side=256)(photo(*size))
    for name, values in maps.items():
        assert values.shape[:2] == size
        assert np.isfinite(values).all(), name


def test_one_value_per_group_becomes_the_bias():
    norm = GroupNorm(4, 4)
    norm.bias.data.copy_(torch.arange(4.0))
    for mode in (True, False):
        values = norm.train(mode)(torch.randn(1, 4, 1, 1)).flatten()
        torch.testing.assert_close(values, torch.arange(4.0), rtol=0, atol=1e-3)
    wide = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(norm(wide), torch.nn.functional.group_norm(wide, 4, norm.weight, norm.bias))


def test_training_on_one_image_of_one_token_is_told():
    model = create("pamm-released").train()
    with pytest.raises(BatchError, match=r"one pixel.*larger images.*or more of them"):
        model(torch.zeros(1, 3, 8, 8))
    logits = create("pamm").train()(torch.zeros(1, 3, 8, 8))
    sum(x.sum() for x in logits.values()).backward()


def test_a_wrapped_network_is_taken_or_refused():
    model, image = create("pamm"), photo(20, 30)
    assert_equal(Predictor(torch.compile(model, backend="eager"))(image), Predictor(model)(image))
    with pytest.raises(PredictError, match=r"found a DataParallel, expected a network of pamm; .*wrapper\.module"):
        Predictor(torch.nn.DataParallel(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_weights_and_outputs_that_are_not_finite_are_refused(tmp_path, value):
    model = create("pamm")
    predictor = Predictor(model)
    with torch.no_grad():
        model.heads["depth"].predict.bias.fill_(value)
    with pytest.raises(PredictError, match=r"output for 'depth' is not finite.*earlier checkpoint"):
        predictor(photo(20, 30))
    model.save_pretrained(tmp_path / "model")
    for source in (model, tmp_path / "model"):
        with pytest.raises(PredictError, match=r"weights that are NaN or infinite, in 1 tensors, e\.g\. heads\.depth"):
            Predictor(source)
