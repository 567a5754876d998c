"""Which arithmetic is chosen, and what the switches of prediction, evaluation and training do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pamm import Predictor
from pamm.command_line import parse_experiment
from pamm.config.experiment import ConfigError, check, load
from pamm.models.registry import build_model
from pamm.runtime.precision import bfloat16_units, choose_precision
from pamm.tasks import create_task
from pamm.training.run import create_loop
from tiny import MODEL, experiment


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(MODEL, {name: create_task(name) for name in ("depth", "normals")}, (48, 64)).eval()


def picture():
    return np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)


def test_auto_takes_bfloat16_where_the_processor_has_units_for_it():
    assert choose_precision("auto") == (torch.bfloat16 if bfloat16_units() else torch.float32)
    assert choose_precision("auto", "meta") == torch.float32
    assert choose_precision("fp32") == torch.float32 and choose_precision("bf16") == torch.bfloat16
    assert choose_precision("fp16") == torch.float16


@pytest.mark.parametrize("word", ["float32", "32-true", "32"])
def test_earlier_words_for_a_precision_are_taken(word, tmp_path):
    assert choose_precision(word) == torch.float32
    assert experiment(str(tmp_path), precision=word).train.precision == "fp32"
    settings, _ = parse_experiment("train", ["demo", "--train.precision", word])
    assert settings.train.precision == "fp32"
    (tmp_path / "own.yaml").write_text(f"train: {{precision: '{word}'}}")
    assert load(tmp_path / "own.yaml").train.precision == "fp32"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--precision", "bf16-mixed", "--device", "cpu", "--devices", "2"], ("bf16", "cpu", 2)),
        (["--precision", "auto", "--train.device", "cuda"], ("auto", "cuda", 1)),
        (["--train.precision=bfloat16", "--train.accelerator", "cpu"], ("bf16", "cpu", 1)),
    ],
)
def test_precision_and_devices_of_a_training(given, expected):
    settings = parse_experiment("train", ["demo", *given])[0].train
    assert (settings.precision, settings.device, settings.devices) == expected


@pytest.mark.parametrize("name", ["fp16", "double"])
def test_a_precision_that_training_lacks_is_told(name, tmp_path):
    with pytest.raises(ConfigError, match=rf"train\.precision: found '{name}', expected one of 'fp32', 'bf16', 'auto'"):
        check(experiment(str(tmp_path), precision=name))


def test_float16_is_near_float32(model):
    exact, rough = Predictor(model)(picture()), Predictor(model, precision="fp16")(picture())
    assert not np.array_equal(exact["depth"], rough["depth"])
    np.testing.assert_allclose(rough["depth"], exact["depth"], atol=0.01 * np.abs(exact["depth"]).max())


@pytest.mark.parametrize(("name", "device"), [("half", "cpu"), ("bf16", "meta")])
def test_a_precision_that_cannot_be_is_told(name, device):
    with pytest.raises(ConfigError, match="precision: "):
        choose_precision(name, device)


def test_a_given_model_stays_as_it_is(model):
    exact = Predictor(model)(picture())
    rough = Predictor(model, precision="bf16")(picture())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert Predictor(model, kernels="off").model is model
    own = dict(Predictor(model).model.named_parameters())
    assert all(own[name] is parameter for name, parameter in model.named_parameters())
    assert not np.array_equal(exact["depth"], rough["depth"])
    np.testing.assert_allclose(rough["depth"], exact["depth"], atol=0.05 * np.abs(exact["depth"]).max())


def test_a_saved_model_is_predicted_in_the_chosen_precision(model, tmp_path):
    model.save_pretrained(tmp_path)
    same = Predictor(tmp_path, precision="fp32")(picture())
    np.testing.assert_array_equal(same["depth"], Predictor(model)(picture())["depth"])
    assert Predictor(tmp_path, precision="bfloat16").model.half_precision == torch.bfloat16


def test_compiling_and_recomputing_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.compile and train\.grad_checkpointing are both on"):
        check(experiment(str(tmp_path), compile=True, grad_checkpointing=True))


def test_training_with_recomputation_gives_the_same_losses(tmp_path):
    base = experiment(str(tmp_path / "rooms"), steps=1)
    losses = []
    for name, settings in (
        ("plain", base),
        ("again", replace(base, train=replace(base.train, grad_checkpointing=True))),
    ):
        loop, loader = create_loop(settings, tmp_path / name)
        loop.model.train()
        losses += [loop.update(parts)[0] for parts in loader]
        loop.close()
    torch.testing.assert_close(losses[0], losses[1])
