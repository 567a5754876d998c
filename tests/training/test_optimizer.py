"""Optimizers and the learning rate."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from pamm.config.experiment import TrainConfig
from pamm.config.recipes import RECIPES
from pamm.models.registry import build_model
from pamm.tasks import create_task
from pamm.training.optimizer import create_optimizer, learning_rate


def test_the_schedule_is_poly_as_torchs():
    config = TrainConfig(steps=50, lr=0.1, power=0.9)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=50, power=0.9)
    for step in range(50):
        assert learning_rate(config, step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()
    warm = [learning_rate(TrainConfig(steps=10**9, lr=1.0, warmup=3), step) for step in range(5)]
    assert warm == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0], rel=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_decays_all_but_the_scans_and_the_priors(name):
    """As the published code (protocol §4), norms and biases included; but not what a decay would pull away from its meaning."""
    experiment = RECIPES[name]()
    config = replace(experiment.model, backbone=replace(experiment.model.backbone, pretrained=False))
    tasks = {task: create_task(task) for task in experiment.tasks}
    model = build_model(config, tasks, experiment.data.size, "meta")
    kinds = {parameter: key.rsplit(".", 1)[-1] for key, parameter in model.named_parameters()}
    decays = {
        kind: {
            group["weight_decay"]
            for group in create_optimizer(model, experiment.train).param_groups
            for p in group["params"]
            if kinds[p] == kind
        }
        for kind in set(kinds.values())
    }
    if experiment.train.weight_decay == 0:
        assert set.union(*decays.values()) == {0.0}
        return
    exempt = {kind for kind, values in decays.items() if values == {0.0}}
    expected = {
        "pamm": {"A_log", "D", "delta_bias", "prior"},
        "pamm-released": set(),
        "mtmamba": {"A_log", "D", "delta_bias"},
        "mtmamba++": {"A_log", "D", "delta_bias"},
        "invpt": set(),
        "taskprompter": set(),
        "mlore": set(),
    }
    assert exempt == expected[experiment.model.decoder.system]
    assert all(decays[kind] == {experiment.train.weight_decay} for kind in decays.keys() - exempt)
    assert {"weight", "bias"} <= decays.keys() - exempt


class Layers(nn.Module):
    """Parameters whose axes lie in memory in several orders."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.plain = nn.Parameter(torch.randn(3, 4, 5, generator=generator))
        self.turned = nn.Parameter(torch.randn(3, 4, 5, generator=generator).mT)
        self.kernel = nn.Parameter(
            torch.randn(6, 4, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
        )
        self.prior = nn.Parameter(torch.randn(7, generator=generator))
        self.prior._no_weight_decay = True

    def gradients(self, seed: int, *, otherwise: bool) -> None:
        """Random gradients, laid out as their parameters or, `otherwise`, in rows."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient if otherwise else torch.empty_like(parameter).copy_(gradient)


@pytest.mark.parametrize("otherwise", [False, True])
@pytest.mark.parametrize(("name", "torchs"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_parameters_become_what_torchs_optimizer_makes_of_them(name, torchs, otherwise):
    ours, plain = Layers(), Layers()
    config = TrainConfig(optimizer=name, lr=1e-2, weight_decay=0.1)
    optimizer = create_optimizer(ours, config)
    groups = [
        {"params": [plain.plain, plain.turned, plain.kernel], "weight_decay": 0.1},
        {"params": [plain.prior], "weight_decay": 0.0},
    ]
    reference = torchs(groups, lr=1e-2, foreach=False)
    for seed in range(3):
        ours.gradients(seed, otherwise=otherwise)
        plain.gradients(seed, otherwise=True)
        optimizer.step()
        reference.step()
    for parameter, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_states_saved_with_another_layout_are_laid_out_as_their_parameters():
    layers, fresh = Layers(), Layers()
    config = TrainConfig(lr=1e-2)
    first, second = create_optimizer(layers, config), create_optimizer(fresh, config)
    layers.gradients(0, otherwise=False)
    first.step()
    state = copy.deepcopy(first.state_dict())
    for values in state["state"].values():
        values.update({key: value.contiguous() for key, value in values.items()})
    second.load_state_dict(state)
    fresh.load_state_dict(layers.state_dict())
    for model, optimizer in ((layers, first), (fresh, second)):
        model.gradients(1, otherwise=False)
        optimizer.step()
    for parameter, expected in zip(fresh.parameters(), layers.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=0)


def test_parameters_that_are_not_one_piece_of_memory():
    """Some input channels of a larger layer's weights, and one channel's weights for three."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 4, 3, 3, generator=generator)
    ours, plain = nn.ParameterList([weights[:, :3], weights[:, :1].expand(-1, 3, -1, -1)]), nn.ParameterList()
    plain.extend(parameter.detach().clone(memory_format=torch.contiguous_format) for parameter in ours)
    optimizer = create_optimizer(ours, TrainConfig(optimizer="adamw", lr=1e-2))
    reference = torch.optim.AdamW(plain, lr=1e-2, weight_decay=TrainConfig().weight_decay, foreach=False)
    for _ in range(3):
        for parameter, expected in zip(ours, plain, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            expected.grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
    for parameter, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
