"""The systems that the papers compare themselves with, in training: every parameter learns, and a run goes on to the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pamm.config.experiment import Experiment
from pamm.models.mlore import imbalance
from pamm.models.registry import build_model
from pamm.nn.router import SpatialRouter
from pamm.prediction import Predictor
from pamm.tasks import create_task
from pamm.training.initial import take_weights
from pamm.training.loop import step_seed
from pamm.training.run import create_loop, train
from prediction.networks import create, photo
from tiny import PEERS, experiment


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("synthetic"))


def of_system(rooms: str, system: str) -> Experiment:
    settings = experiment(rooms, steps=2, save_every=1, batch=2)
    data = replace(settings.data, size=(64, 64), images=(4, 1))
    return replace(settings, data=data, model=PEERS[system])


@pytest.mark.parametrize("system", PEERS)
def test_a_run_goes_on_to_the_same_bits_and_every_parameter_learns(rooms, tmp_path, system):
    settings = of_system(rooms, system)
    train(settings, tmp_path / "whole", progress=False)
    loop, loader = create_loop(settings, tmp_path / "parts")
    loop.model.train()
    losses, _ = loop.update(next(iter(loader)))
    assert losses.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loop.network.parameters())
    loop.state["step"] = 1
    loop.save()
    loop.close()
    train(settings, tmp_path / "parts", progress=False)
    whole, parts = (load_file(tmp_path / name / "last/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    maps = Predictor(tmp_path / "parts")(photo(50, 70))
    assert maps["semseg"].shape == (50, 70)


def outputs(system: str, training: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return create(system).train(training)(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("system", PEERS)
def test_what_is_for_the_losses_is_there_in_training_alone(system):
    tasks = list(create(system).tasks)
    assert list(outputs(system, training=False)) == tasks
    further = {"invpt": [f"intermediate/{task}" for task in tasks], "mlore": ["loss/load_balancing"]}
    found = outputs(system, training=True)
    assert list(found) == tasks + further.get(system, [])
    for name in further["invpt"] if system == "invpt" else []:
        assert found[name].shape == found[name.removeprefix("intermediate/")].shape


@pytest.mark.parametrize("system", ["invpt", "mlore"])
def test_intermediate_logits_and_the_load_balancing_enter_the_loss(rooms, tmp_path, system):
    """The tasks' losses once more, with their weights; and the number as it is."""
    settings = of_system(rooms, system)
    settings = replace(settings, train=replace(settings.train, clip=None))
    if system == "mlore":  # heavy enough to show
        heavy = replace(settings.model.decoder, load_balancing=10.0)
        settings = replace(settings, model=replace(settings.model, decoder=heavy))
    loop, loader = create_loop(settings, tmp_path)
    part = next(iter(loader))[0]
    network = loop.network.train()
    torch.manual_seed(step_seed(settings.train.seed, 0))
    found = network(part.image, part.label_size)
    total = sum(value for name, value in found.items() if name.startswith("loss/"))
    for name, task in loop.tasks.items():
        for key in (name, f"intermediate/{name}"):
            if key in found:
                counts = task.counts(part.labels[name])
                total = total + task.weight * task.loss(found[key], part.labels[name], counts)
    names, parameters = zip(*network.named_parameters(), strict=True)
    expected = torch.autograd.grad(total, parameters)
    loop.update([part])
    for name, parameter, gradient in zip(names, parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)
    loop.close()


def test_the_imbalance_of_experts_is_the_squared_variation_of_their_use():
    routes = torch.rand(3, 2, 5)
    use = routes.mean((0, 1))
    assert float(imbalance(routes)) == pytest.approx(float(use.var() / use.mean() ** 2), rel=1e-5)
    assert float(imbalance(torch.full((3, 2, 5), 0.2))) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("renormalised", [False, True])
def test_the_two_ways_of_choosing_experts(renormalised):
    torch.manual_seed(0)
    router = SpatialRouter(16, (3, 4), experts=7, top_k=4, renormalised=renormalised).eval()
    with torch.no_grad():
        weights, _ = router(torch.randn(5, 16, 3, 4))
    assert ((weights > 0).sum(1) == 4).all()
    sums = weights.sum(1)
    assert torch.allclose(sums, torch.ones(5)) if renormalised else (sums < 0.999).all()


def test_weights_of_positions_are_resized_for_fine_tuning_as_for_a_checkpoint():
    """A map of another size is spread and gathered as that of the first, and the sum over it keeps its scale."""
    tasks = {"depth": create_task("depth")}
    source, network = (build_model(PEERS["taskprompter"], tasks, size) for size in ((64, 64), (96, 128)))
    with torch.no_grad():
        source.backbone.spread[0].weight.copy_(torch.ones(64, 32))
        source.backbone.gather[0].weight.copy_(torch.ones(32, 64))
    fit = take_weights(network, source, "the source")
    assert fit.share == 1 and "resized, 8×8 tokens there, 12×16 here" in str(fit)
    ones = torch.ones(1, 1, 32)
    maps = [model.backbone.spread[0](ones) - model.backbone.spread[0].bias for model in (source, network)]
    assert maps[1].shape == (1, 1, 192)
    torch.testing.assert_close(maps[1].sum(), maps[0].sum())
    gathered = [model.backbone.gather[0](x) for model, x in zip((source, network), maps, strict=True)]
    torch.testing.assert_close(gathered[1], gathered[0])
