"""Files of earlier formats: saved models, and runs that go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pamm
from pamm.config.experiment import ModelConfig
from pamm.models.registry import build_model
from pamm.models.saved import CheckpointError
from pamm.nn.task_layers import TaskLinear
from pamm.tasks import create_task
from pamm.training.optimizer import create_optimizer
from pamm.training.run import create_loop
from tiny import BACKBONE, DECODER, MTMAMBA, SWIN, experiment

NAMES = ("semseg", "depth")


def build(system: str = "pamm"):
    torch.manual_seed(0)
    config = ModelConfig(BACKBONE, DECODER) if system == "pamm" else ModelConfig(SWIN, MTMAMBA)
    return build_model(config, {name: create_task(name) for name in NAMES}, (64, 64)).eval()


def task_weights(model) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, TaskLinear)}


def as_format_1(folder: Path, model) -> None:
    """Make a saved model's files what the version before format 2 wrote."""
    weights, turned = load_file(folder / "model.safetensors"), task_weights(model)
    assert turned
    save_file({k: w.mT.contiguous() if k in turned else w for k, w in weights.items()}, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    assert settings.pop("format") == 3
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("system", ["pamm", "mtmamba"])
def test_a_model_of_format_1_predicts_the_same_bits(system, tmp_path):
    model = build(system)
    model.save_pretrained(tmp_path)
    as_format_1(tmp_path, model)
    old = pamm.load_model(tmp_path)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for name, expected in model(image).items():
            assert torch.equal(old(image)[name], expected)
    old.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["format"] == 3
    with torch.no_grad():
        assert torch.equal(pamm.load_model(tmp_path / "again")(image)["depth"], old(image)["depth"])


@pytest.mark.parametrize("found", [4, "2", 0, None])
def test_a_format_that_is_not_known_is_told(found, tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": found}))
    with pytest.raises(CheckpointError, match=r"format: found .*, this version reads 1 to 3; .*upgrade pamm$"):
        pamm.load_model(tmp_path)


def run(out: Path, steps: int, kernels: str) -> dict[str, torch.Tensor]:
    """A run of four steps up to so many of them, saved at every second: the weights of last/ at its end."""
    loop, loader = create_loop(experiment(str(out.parent / "data"), optimizer="adamw"), out, kernels=kernels)
    loop.model.train()
    for parts in loader:
        loop._one_step(parts)
        if loop.state["step"] == steps:
            break
    loop.close()
    return load_file(out / "last" / "model.safetensors")


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_a_run_of_format_1_goes_on_to_the_same_bits(kernels, tmp_path):
    run(tmp_path / "new", 2, kernels)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    loop, _ = create_loop(experiment(str(tmp_path / "data"), optimizer="adamw"), tmp_path / "probe")
    loop.close()
    as_format_1(tmp_path / "old" / "last", loop.network)
    path = tmp_path / "old" / "last" / "training.pt"
    training = torch.load(path, weights_only=True)
    names = {id(parameter): name for name, parameter in loop.network.named_parameters()}
    optimizer = create_optimizer(loop.network, loop.config)
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    turned = task_weights(loop.network)
    for number, values in training["optimizer"]["state"].items():
        if order[number] in turned:
            values |= {key: values[key].mT.contiguous() for key in ("exp_avg", "exp_avg_sq")}
    torch.save(training, path)
    expected, found = run(tmp_path / "new", 4, kernels), run(tmp_path / "old", 4, kernels)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def as_format_2(folder: Path) -> None:
    """Make a saved model's config.json what the version before format 3 wrote."""
    settings = json.loads((folder / "config.json").read_text())
    assert settings.pop("format") == 3
    backbone, decoder = settings["model"]["backbone"], settings["model"]["decoder"]
    backbone["taps"] = [index + 1 for index in backbone.pop("out_indices")]
    for new, old in (("drop_path_rate", "drop_path"), ("patch_size", "patch"), ("embed_dim", "width")):
        backbone[old] = backbone.pop(new)
    number = backbone.pop("num_heads")
    backbone |= {"heads": None, "stage_heads": number} if isinstance(number, list) else {"heads": number}
    backbone |= {"stage_depths": backbone.pop("depths"), "window": backbone.pop("window_size")}
    for new, old in (("drop_path_rate", "drop_path"), ("window_size", "window"), ("kernel_size", "kernel")):
        if new in decoder:
            decoder[old] = decoder.pop(new)
    (folder / "config.json").write_text(json.dumps({"format": 2} | settings))


@pytest.mark.parametrize("system", ["pamm", "mtmamba"])
def test_a_model_of_format_2_predicts_the_same_bits(system, tmp_path):
    """Its settings have earlier names, see `pamm.config.renamed`."""
    model = build(system)
    model.save_pretrained(tmp_path)
    as_format_2(tmp_path)
    old = pamm.load_model(tmp_path)
    assert old.settings == model.settings
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for name, expected in model(image).items():
            assert torch.equal(old(image)[name], expected)
