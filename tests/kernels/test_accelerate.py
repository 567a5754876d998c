"""The pass over a network: what it replaces, what it leaves as it is, and what a network keeps through it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import pamm
from pamm.config.experiment import ExpertsConfig, ModelConfig, MTMambaConfig, ReleasedConfig
from pamm.config.strict import ConfigError
from pamm.kernels import REWRITES, accelerate, apply_choice, matrix
from pamm.models.model import MultiTaskModel
from pamm.models.pamm import ConvHead
from pamm.models.registry import build_model
from pamm.tasks import create_task
from tiny import BACKBONE, DECODER, MTMAMBA, PEERS, SWIN

NAMES = ("semseg", "depth")
EXPERTS = ExpertsConfig(count=5, top_k=3, rank=2)
SYSTEMS = {
    "pamm": (BACKBONE, DECODER),
    "released": (BACKBONE, ReleasedConfig(width=32, state_size=4, experts=EXPERTS, kernel_size=9)),
    "mtmamba": (SWIN, MTMAMBA),
    "mtmamba++": (SWIN, MTMambaConfig("mtmamba++", state_size=4, head_width=8, window_size=3)),
    **{name: (config.backbone, config.decoder) for name, config in PEERS.items()},
}


def build(system: str, *, shallow: bool = False) -> MultiTaskModel:
    """A network, or one of the fewest layers and tasks that have every kind of module."""
    torch.manual_seed(0)
    backbone, decoder = SYSTEMS[system]
    if shallow and "mtmamba" in system:
        backbone, decoder = replace(SWIN, depths=(1, 1, 1, 1)), replace(decoder, stm=1)
    elif shallow and system in ("pamm", "released", "mlore"):
        backbone = replace(BACKBONE, depth=1, out_indices=(0,))
    names = NAMES[:1] if shallow else NAMES
    model = build_model(ModelConfig(backbone, decoder), {name: create_task(name) for name in names}, (64, 64))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def worth_while(monkeypatch):
    """As on a processor whose matrix products are slow, so that every rewrite applies wherever there is a C compiler."""
    monkeypatch.setattr(matrix, "SLOW_PRODUCTS", True)
    monkeypatch.delenv("PAMM_KERNELS", raising=False)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("training", [False, True])
def test_parameters_names_and_outputs_stay(system, training):
    plain = build(system).train(training)
    model = copy.deepcopy(plain)
    held, keys = dict(model.named_parameters()), list(model.state_dict())
    report = accelerate(model, training=training)
    assert report.replaced and list(model.state_dict()) == keys
    for name, parameter in model.named_parameters():
        assert parameter is held[name], name
        assert parameter.stride() == plain.get_parameter(name).stride(), name
    for name in (name for names in report.replaced.values() for name in names):
        assert isinstance(model.get_submodule(name), type(plain.get_submodule(name)))
        assert type(model.get_submodule(name)) is not type(plain.get_submodule(name))
    steps = []
    for network in (plain, model):
        torch.manual_seed(7)
        with torch.set_grad_enabled(training):
            logits = network(image())
        if training:
            sum(x.square().mean() for x in logits.values()).backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        steps.append({name: x.detach() for name, x in logits.items()} | gradients | dict(network.named_buffers()))
    assert steps[0].keys() == steps[1].keys()
    for name, expected in steps[0].items():
        torch.testing.assert_close(
            steps[1][name], expected, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_report_tells_what_was_replaced_and_why_the_rest_was_not():
    report = accelerate(build("pamm"), training=False)
    assert report.replaced["heads"] == ["heads.semseg", "heads.depth"]
    assert report.left["released experts"] == "no such module"
    assert report.replaced.keys() | report.left.keys() == {rewrite.name for rewrite in REWRITES}
    assert "heads: 2 modules replaced" in str(report) and "released experts: left to torch (no such module)" in str(
        report
    )
    assert accelerate(build("released"), training=True).replaced["released experts (in evaluations only)"]


def test_a_second_pass_finds_nothing():
    model = build("pamm")
    accelerate(model, training=False)
    kinds = [type(module) for module in model.modules()]
    assert not accelerate(model, training=False).replaced
    assert [type(module) for module in model.modules()] == kinds


def test_switched_off(monkeypatch):
    model = build("pamm")
    kinds = [type(module) for module in model.modules()]
    assert not apply_choice(model, "off", training=False).replaced
    monkeypatch.setenv("PAMM_KERNELS", "off")
    report = accelerate(model, training=False)
    assert not report.replaced and set(report.left.values()) == {"switched off by PAMM_KERNELS=off"}
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(ConfigError, match="found 'on', expected one of auto, off"):
        apply_choice(model, "on", training=False)


def test_on_a_processor_with_fast_products_they_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(matrix, "SLOW_PRODUCTS", False)
    report = accelerate(build("pamm"), training=False)
    assert report.left["matrix products"] == "torch's products are fast on this processor"
    assert report.replaced["heads"]


class Doubled(ConvHead):
    """A user's own head."""

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(feature)


def test_a_subclass_is_left_as_it_is():
    model = build("pamm").eval()
    model.heads["depth"] = Doubled(DECODER.width, model.tasks["depth"].channels).eval()
    report = accelerate(model, training=False)
    assert report.replaced["heads"] == ["heads.semseg"] and type(model.heads["depth"]) is Doubled


def test_hooks_stay_and_can_be_removed_afterwards():
    model, seen = build("pamm").eval(), []
    handle = model.heads["depth"].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    accelerate(model, training=False)
    with torch.no_grad():
        model(image())
        assert len(seen) == 1
        handle.remove()
        model(image())
    assert len(seen) == 1


def test_a_module_that_stands_at_two_places_stays_one():
    shared = nn.Linear(64, 512)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(512, 64))})
    accelerate(model, training=False)
    assert model["a"] is model["b"][0] and type(model["a"]) is matrix.KernelLinear


def test_an_accelerated_network_can_be_copied_saved_and_loaded(tmp_path):
    plain = build("released").eval()
    model = copy.deepcopy(plain)
    accelerate(model, training=False)
    copied = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    loaded = pamm.load_model(tmp_path)
    assert not any(type(module).__module__.startswith("pamm.kernels") for module in loaded.modules())
    with torch.no_grad():
        for name, expected in plain(image()).items():
            assert torch.equal(loaded(image())[name], expected)
            torch.testing.assert_close(copied(image())[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "system", [pytest.param(name, marks=pytest.mark.exhaustive if name == "mtmamba" else ()) for name in SYSTEMS]
)
def test_an_accelerated_network_exports_for_other_machines(system):
    model = build(system, shallow=True).eval()
    with torch.no_grad():
        expected = model(image())
        accelerate(model, training=False)
        exported = torch.export.export(model, (image(),))
    assert "ops.pamm" not in str(exported.graph)
    for name, found in exported.module()(image()).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4)


def test_a_network_as_it_is_calls_no_kernel_but_the_scan():
    """So that anybody can compile, export or transform it."""
    operators = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            operators.append(str(function))
            return function(*arguments, **(options or {}))

    for system in SYSTEMS:
        with torch.no_grad(), Calls():
            build(system).eval()(image())
    assert {name for name in operators if name.startswith("pamm")} == {"pamm.selective_scan.default"}


def test_a_given_model_is_not_changed_by_a_predictor():
    model = build("pamm").eval()
    kinds = [type(module) for module in model.modules()]
    predictor = pamm.Predictor(model)
    assert [type(module) for module in model.modules()] == kinds
    own = dict(predictor.model.named_parameters())
    assert all(own[name] is parameter for name, parameter in model.named_parameters())
    assert type(predictor.model.heads["depth"]) is not ConvHead
    assert type(pamm.Predictor(model, kernels="off").model.heads["depth"]) is ConvHead
