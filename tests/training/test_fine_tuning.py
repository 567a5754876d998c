"""Fine-tuning: weights go by tensor, task and class; what fits and what starts anew is told; frozen parts stay as they are."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from command import run_command
from pamm.config.experiment import ExpertsConfig, ReleasedConfig, TaskConfig, dump, load
from pamm.config.strict import ConfigError
from pamm.models.registry import build_model
from pamm.models.saved import CheckpointError
from pamm.tasks import create_task
from pamm.training.initial import take_weights
from pamm.training.run import create_loop, train
from tiny import DECODER, MODEL, MTMAMBA, SWIN, experiment

RELEASED = ReleasedConfig(width=32, state_size=4, kernel_size=3, experts=ExpertsConfig(count=3, top_k=2, rank=2))
MODELS = {
    "pamm": MODEL,
    "pamm, all off": dataclasses.replace(MODEL, decoder=dataclasses.replace(DECODER, task_conv=False, prior_B=False)),
    "pamm-released": dataclasses.replace(MODEL, decoder=RELEASED),
    "mtmamba": dataclasses.replace(MODEL, backbone=SWIN, decoder=MTMAMBA),
    "mtmamba++": dataclasses.replace(MODEL, backbone=SWIN, decoder=dataclasses.replace(MTMAMBA, system="mtmamba++")),
    "swin blocks": dataclasses.replace(
        MODEL, backbone=SWIN, decoder=dataclasses.replace(MTMAMBA, block="swin", ctm=False)
    ),
}
CLASSES = ["sky", "tree", "road", "car"]
SIZE = (64, 96)


def build(names, *, model="pamm", classes=CLASSES, size=SIZE, seed=0, **options):
    torch.manual_seed(seed)
    tasks = {}
    for name in names:
        own = {"classes": classes} if name == "semseg" else options.get(name, {})
        tasks[name] = create_task(name, **own)
    settings = MODELS[model] if isinstance(model, str) else model
    network = build_model(settings, tasks, size).eval()
    with torch.no_grad():  # values that no initialisation has, constants and statistics included
        for index, value in enumerate(network.state_dict().values()):
            if value.is_floating_point():
                value.add_(0.01 * torch.rand(value.shape, generator=torch.Generator().manual_seed(1000 * seed + index)))
    return network


@torch.no_grad()
def outputs(network, size=SIZE):
    return network(torch.linspace(-1, 1, 3 * size[0] * size[1]).view(1, 3, *size))


@pytest.mark.parametrize("model", MODELS)
def test_tasks_in_another_order_compute_the_same(model):
    """Tasks are slices of one tensor: in place they would be mixed without a word."""
    source = build(["semseg", "depth", "normals"], model=model, seed=1)
    network = build(["normals", "semseg", "depth"], model=model, seed=2)
    fit = take_weights(network, source, "the source")
    assert fit.share == 1 and not fit.unused and "100.0 %" in str(fit)
    for name, expected in outputs(source).items():
        torch.testing.assert_close(outputs(network)[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["pamm", "pamm-released"])
def test_a_new_task_leaves_the_others_as_they_were(model):
    """In PAMM a task's output does not depend on which others there are."""
    source = build(["depth", "semseg"], model=model, seed=1)
    network = build(["edge", "semseg", "depth"], model=model, seed=2)
    before = {name: value.clone() for name, value in network.state_dict().items() if "heads.edge" in name}
    fit = take_weights(network, source, "the source")
    for name, expected in outputs(source).items():
        torch.testing.assert_close(outputs(network)[name], expected, rtol=1e-4, atol=1e-5)
    for name, value in before.items():
        assert torch.equal(network.state_dict()[name], value), name
    assert 0 < fit.share < 1
    assert "new: 7 tensors, e.g. heads.edge" in str(fit) or "the source has no task edge" in str(fit)
    if model == "pamm":
        assert "the slices of edge are new" in str(fit)


def test_fewer_tasks_take_theirs():
    source = build(["semseg", "depth", "normals"], seed=1)
    network = build(["normals"], seed=2)
    fit = take_weights(network, source, "the source")
    assert fit.share == 1 and any(name.startswith("heads.semseg") for name in fit.unused)
    torch.testing.assert_close(outputs(network)["normals"], outputs(source)["normals"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["pamm", "pamm-released", "mtmamba", "mtmamba++"])
def test_classes_go_by_their_names(model):
    source = build(["semseg"], model=model, seed=1)
    network = build(["semseg"], model=model, classes=["car", "house", "sky", "lamp", "tree"], seed=2)
    fit = take_weights(network, source, "the source")
    ours, theirs = outputs(network)["semseg"], outputs(source)["semseg"]
    torch.testing.assert_close(ours[:, [0, 2, 4]], theirs[:, [3, 0, 1]], rtol=1e-4, atol=1e-5)
    assert "3 of 5 classes taken by their names; new: house, lamp" in str(fit)


def test_the_same_classes_in_another_order_are_never_mixed():
    source, network = build(["semseg"], seed=1), build(["semseg"], classes=CLASSES[::-1], seed=2)
    fit = take_weights(network, source, "the source")
    torch.testing.assert_close(outputs(network)["semseg"], outputs(source)["semseg"].flip(1), rtol=1e-4, atol=1e-5)
    assert "another order" in str(fit)


@pytest.mark.parametrize(("count", "told"), [(4, "only numbers"), (6, "6 classes without names there, 4 here")])
def test_classes_without_names(count, told):
    """Published checkpoints tell how many classes there are, not which."""
    source = build(["semseg"], classes=[f"class {index}" for index in range(count)], seed=1)
    network = build(["semseg"], seed=2)
    first = network.heads["semseg"].predict.weight.clone()
    assert told in str(take_weights(network, source, "the source"))
    taken = source.heads["semseg"].predict.weight
    assert torch.equal(network.heads["semseg"].predict.weight, taken if count == 4 else first)


def test_disparity_is_not_taken_for_depth():
    source, network = build(["depth"], depth={"unit": "disparity"}, seed=1), build(["depth"], seed=2)
    first = network.heads["depth"].predict.weight.clone()
    assert "the source predicts disparity" in str(take_weights(network, source, "the source"))
    assert torch.equal(network.heads["depth"].predict.weight, first)
    assert torch.equal(network.heads["depth"].conv.weight, source.heads["depth"].conv.weight)


def test_positions_are_resized_for_another_image_size():
    source, network = build(["depth"], seed=1), build(["depth"], size=(96, 64), seed=2)
    fit = take_weights(network, source, "the source")
    expected = resample_abs_pos_embed(source.backbone.vit.pos_embed, [12, 8], [8, 12], num_prefix_tokens=1)
    assert torch.equal(network.backbone.vit.pos_embed, expected) and fit.share == 1
    assert "resized, 8×12 tokens there, 12×8 here" in str(fit)


def test_another_patch_and_other_settings_are_told():
    backbone = dataclasses.replace(MODEL.backbone, patch_size=16, num_heads=4)
    other = dataclasses.replace(MODEL, backbone=backbone, decoder=dataclasses.replace(DECODER, scan="morton"))
    told = str(take_weights(build(["depth"], seed=2), build(["depth"], model=other, seed=1), "the source"))
    assert "backbone.vit.patch_embed.proj.weight: another shape, [32, 3, 16, 16] there, [32, 3, 8, 8] here" in told
    assert "backbone.patch_size 16 there, 8 here" in told and "decoder.scan morton there, hilbert here" in told
    assert "backbone.num_heads 4 there, 2 here" in told


def test_a_source_of_which_nothing_fits_is_refused():
    other = dataclasses.replace(
        MODEL,
        backbone=dataclasses.replace(MODEL.backbone, embed_dim=48),
        decoder=dataclasses.replace(DECODER, width=32, state_size=8),
    )
    network = build(["depth"], seed=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"nothing of it fits this network"):
        take_weights(network, build(["normals"], model=other, seed=1), "the source")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_weights_that_are_not_finite_are_refused():
    source = build(["depth"], seed=1)
    with torch.no_grad():
        source.backbone.vit.blocks[0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"fc1\.weight holds numbers that are not finite"):
        take_weights(build(["depth"], seed=2), source, "the source")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="module")
def pretrained(rooms, tmp_path_factory) -> Path:
    """A finished run with two tasks."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    train(with_tasks(experiment(rooms, steps=1), "semseg", "depth"), folder, progress=False)
    return folder


def with_tasks(settings, *names):
    return dataclasses.replace(settings, tasks={name: TaskConfig() for name in names})


def test_a_run_starts_from_another_and_goes_on_without_it(rooms, pretrained, tmp_path, capsys):
    """Resumed twice: once without naming the source, after it is gone; the bits are those of an uninterrupted run."""
    source = tmp_path / "source"
    shutil.copytree(pretrained, source)
    whole = with_tasks(experiment(rooms, steps=3, save_every=1, init=str(source)), "depth", "normals")
    train(whole, tmp_path / "whole", progress=False)
    assert "weights from" in capsys.readouterr().err
    assert "the source has no task normals" in (tmp_path / "whole/init.txt").read_text()
    loop, loader = create_loop(whole, tmp_path / "halved")
    loop._one_step(next(iter(loader)))
    loop.close()
    assert load(tmp_path / "halved/experiment.yaml").train.init == str(source)
    shutil.rmtree(source)
    unnamed = dataclasses.replace(whole, train=dataclasses.replace(whole.train, init=None))
    train(unnamed, tmp_path / "halved", progress=False)
    assert load(tmp_path / "halved/experiment.yaml").train.init == str(source)
    one, two = (load_file(tmp_path / name / "last/model.safetensors") for name in ("whole", "halved"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(ConfigError, match=r"holds another experiment \(train\.init: .*source there, elsewhere here\)"):
        train(
            dataclasses.replace(whole, train=dataclasses.replace(whole.train, init="elsewhere")),
            tmp_path / "halved",
            progress=False,
        )


def test_the_command_line_fine_tunes(rooms, pretrained, tmp_path, capsys):
    """A finished run goes on with more steps, its backbone frozen; the plain options are leaves of the experiment."""
    dump(with_tasks(experiment(rooms, steps=2), "semseg", "depth"), tmp_path / "given.yaml")
    more = ["--init", pretrained, "--freeze", "backbone", "--train.save-minutes", 0, "--quiet"]
    run_command(capsys, "train", tmp_path / "given.yaml", "--out", tmp_path / "more", *more, code=0)
    start, end = load_file(pretrained / "best/model.safetensors"), load_file(tmp_path / "more/last/model.safetensors")
    for name, value in end.items():
        if name.startswith("backbone."):
            assert torch.equal(value, start[name]), name
    assert not torch.equal(end["heads.depth.predict.weight"], start["heads.depth.predict.weight"])
    recorded = load(tmp_path / "more/experiment.yaml").train
    assert (recorded.init, recorded.freeze) == (str(pretrained), "backbone")
    told = run_command(capsys, "train", tmp_path / "given.yaml", "--init", pretrained, "--out", pretrained, code=1)
    assert "is in the run folder" in told and "--out" in told


@pytest.mark.parametrize("model", ["pamm", "mtmamba"])
def test_the_first_blocks_stay_as_they_are(rooms, tmp_path, model):
    """No gradient, no decay, no stochastic depth; what comes after them is trained, at the backbone's own rate."""
    settings = experiment(rooms, steps=2, freeze="backbone:1", weight_decay=0.1, optimizer="adamw", clip=None)
    settings = dataclasses.replace(with_tasks(settings, "depth"), model=MODELS[model])
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, size=SIZE))
    loop, loader = create_loop(settings, tmp_path / "run")
    start = {name: value.clone() for name, value in loop.network.state_dict().items()}
    loop.run(loader)
    end = load_file(tmp_path / "run/last/model.safetensors")
    moved = {name for name in start if name.startswith("backbone.") and not torch.equal(start[name], end[name])}
    assert moved and not any("patch_embed" in name or "pos_embed" in name for name in moved)
    first = "backbone.vit.blocks.0." if model == "pamm" else "backbone.swin.layers.0."
    assert not any(name.startswith(first) for name in moved)


def test_the_backbone_has_a_rate_of_its_own(rooms, tmp_path):
    """Adam's first step is lr · sign(gradient)."""
    settings = with_tasks(experiment(rooms, steps=2, backbone_lr_scale=0.1, weight_decay=0.0), "depth")
    loop, loader = create_loop(settings, tmp_path / "run")
    start = {name: value.clone() for name, value in loop.network.named_parameters()}
    loop._one_step(next(iter(loader)))
    loop.close()
    for name, value in loop.network.named_parameters():
        clear = value.grad.abs() > 1e-5
        steps = (value - start[name]).abs()[clear]
        rate = 1e-4 if name.startswith("backbone.") else 1e-3
        assert (steps - rate).abs().max() < 2e-6 if len(steps) else True, name


@pytest.mark.parametrize("what", ["decoder", "backbone:0", "backbone:3", "backbone:", "backbone:-1"])
def test_what_cannot_be_frozen_is_told(rooms, tmp_path, what):
    with pytest.raises(ConfigError, match=r"train\.freeze: found .*, expected backbone"):
        create_loop(experiment(rooms, freeze=what), tmp_path / "run")
