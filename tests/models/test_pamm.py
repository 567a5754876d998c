"""The PAMM network against an independent, per-task form of the paper's equations, and the promises of every variant."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from pamm.config.experiment import BackboneConfig, ExpertsConfig, ModelConfig, PAMMConfig
from pamm.config.recipes import VARIANTS, get_recipe
from pamm.config.strict import ConfigError
from pamm.models.backbone import create_backbone
from pamm.models.pamm import PAME, ParameterExperts, Router, TaskDecoder
from pamm.models.registry import build_model
from pamm.nn.serialize import scan_orders
from pamm.tasks import create_task
from tiny import BACKBONE, DECODER

NAMES = ("semseg", "depth", "normals")


def build(decoder: PAMMConfig = DECODER, backbone: BackboneConfig = BACKBONE, names=NAMES, size=(48, 64)):
    torch.manual_seed(0)
    return build_model(ModelConfig(backbone, decoder), {name: create_task(name) for name in names}, size)


def plain_experts(block: ParameterExperts, task: int, x: torch.Tensor) -> torch.Tensor:
    """Eq. 11-15 for one task and one image, x (L, e): router, then every expert in a loop."""
    y = x @ block.linear.weight[task].T
    if block.router is None:
        return y
    router = block.router
    quarter = router.project.weight.shape[1] // 2
    weight, bias = router.project.weight[task].T, router.project.bias[task, 0]
    linear_1 = x @ weight[:, :quarter] + bias[:quarter]  # at every position, then pooled
    f_r = torch.cat([linear_1.mean(0), x.mean(0) @ weight[:, quarter:] + bias[quarter:]])
    scores = F.gelu(f_r @ router.logits.weight[task].T + router.logits.bias[task, 0]).softmax(0)
    for j in scores.argsort(descending=True)[: router.top_k].tolist():
        rows = slice(j * block.rank, (j + 1) * block.rank)
        y = y + scores[j] * (x @ block.reduce.weight[rows].T) @ block.restore[rows]
    return y


def plain_scan(x, delta, A, B, C, D, orders):
    """Eq. 17-20 for one sequence set: numpy-like loops. x, delta (L, e), A (e, N), B, C (L, N), D (e,)."""
    y = torch.zeros_like(x)
    for order in orders.tolist():
        state = torch.zeros_like(A)
        for position in order:
            step = delta[position][:, None]
            state = torch.exp(step * A) * state + step * x[position][:, None] * B[position]
            y[position] = y[position] + state @ C[position] + D * x[position]
    return y


def plain_pame(pame: PAME, u: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
    """Fig. 3, one image and one task at a time."""
    out = torch.empty_like(u)
    width = u.shape[2]
    for image in range(u.shape[0]):
        for task in range(u.shape[1]):
            channels = slice(task * width, (task + 1) * width)
            f = u[image : image + 1, task]
            n = F.group_norm(f, 32, pame.norm.weight[channels], pame.norm.bias[channels])
            local = F.conv2d(n, pame.dwconv.weight[channels], pame.dwconv.bias[channels], padding=1, groups=width)
            tokens = F.silu(local)[0].flatten(1).T
            z = F.silu(n[0].flatten(1).T @ pame.gate.weight[task].T + pame.gate.bias[task, 0])
            x = tokens @ pame.expand.weight[task].T + pame.expand.bias[task, 0]
            delta = F.softplus(x @ pame.delta[0].weight[task].T @ pame.delta[1].weight[task].T + pame.delta_bias[task])
            B = plain_experts(pame.B, task, x) + pame.prior_B.prior[task, 0]
            C = plain_experts(pame.C, task, x) + pame.prior_C.prior[task, 0]
            y = plain_scan(x, delta, -torch.exp(pame.A_log[task]), B, C, pame.D[task], orders)
            y = (y @ pame.contract.weight[task].T + pame.contract.bias[task, 0]) * z
            out[image, task] = f[0] + y.T.view_as(f[0])
    return out


def test_pame_equals_the_papers_equations_task_by_task():
    torch.manual_seed(1)
    pame = PAME(DECODER, tasks=2).eval()
    with torch.no_grad():
        pame.prior_B.prior.mul_(20)
        pame.prior_C.prior.mul_(20)
    orders = scan_orders("hilbert", 3, 4, 4)
    u = torch.randn(2, 2, 64, 3, 4, requires_grad=True)
    twin = u.detach().clone().requires_grad_()
    ours, plain = pame(u, orders), plain_pame(pame, twin, orders)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(ours)
    parameters = dict(pame.named_parameters())
    ours_gradients = torch.autograd.grad((ours * weight).sum(), [u, *parameters.values()], allow_unused=True)
    plain_gradients = torch.autograd.grad((plain * weight).sum(), [twin, *parameters.values()], allow_unused=True)
    for name, a, b in zip(["u", *parameters], ours_gradients, plain_gradients, strict=True):
        if "noise" not in name:  # the noise head acts in training only
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_router_keeps_the_largest_weights_of_the_softmax_without_renormalising():
    torch.manual_seed(0)
    router = Router(2, 16, experts=15, top_k=9).eval()
    x = torch.randn(2, 3, 16)
    kept, every = router(x), Router(2, 16, experts=15, top_k=15).eval()
    every.load_state_dict(router.state_dict())
    full = every(x)
    torch.testing.assert_close(full.sum(-1), torch.ones(2, 3))
    assert ((kept > 0).sum(-1) == 9).all()
    torch.testing.assert_close(kept, torch.where(full >= full.topk(9).values[..., -1:], full, 0.0))


def test_router_noise_acts_in_training_only_and_per_image():
    router = Router(1, 16, experts=15, top_k=15)
    x = torch.randn(1, 1, 16).expand(1, 4, 16)
    torch.manual_seed(3)
    noisy = router.train()(x)
    assert not torch.allclose(noisy[0, 0], noisy[0, 1])
    clean = router.eval()(x)
    assert torch.equal(clean[0, 0], clean[0, 1])


def test_task_decoder_is_a_convex_combination_of_the_stages():
    decoder = TaskDecoder(32, 3, 2)
    ones = [torch.full((1, 2, 32, 4, 5), float(s)) for s in (1, 2, 3)]
    fused = decoder(ones)
    assert fused.min() >= 1 and fused.max() <= 3
    same = [torch.full((1, 2, 32, 4, 5), 7.0)] * 3
    torch.testing.assert_close(decoder(same), same[0])


@pytest.mark.parametrize("variant", ["", *VARIANTS])
def test_every_parameter_of_every_variant_gets_a_gradient(variant):
    decoder = DECODER
    out_indices = (0, 1)
    if variant:
        derived = get_recipe(f"pascal-pamm-b+{variant}").model
        decoder = replace(derived.decoder, width=64, state_size=4)
        out_indices = tuple(range(2 - min(2, len(derived.backbone.out_indices)), 2))
    model = build(
        decoder, replace(BACKBONE, out_indices=out_indices, drop_path_rate=0.0)
    ).train()  # a dropped path has no gradient
    logits = model(torch.randn(2, 3, 48, 64))
    sum((x * torch.randn_like(x)).sum() for x in logits.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_switches_remove_what_they_name():
    def keys(**changes):
        return {
            ".".join(k.split(".")[2:4]) for k in build(replace(DECODER, **changes)).decoder.state_dict() if "pame" in k
        }

    assert {"prior_B.prior", "prior_C.prior", "B.router", "C.router"} <= keys()
    assert "prior_B.prior" not in keys(prior_B=False)
    assert "prior_C.prior" not in keys(prior_C=False)
    no_B = keys(experts=replace(DECODER.experts, B=False))
    assert "B.router" not in no_B and "C.router" in no_B and "B.linear" in no_B
    assert keys(pame=False) == set()
    plain = build(replace(DECODER, pame=False, task_conv=False), replace(BACKBONE, embed_dim=64)).decoder
    assert all(key.startswith("fuse") for key in plain.state_dict())


@pytest.mark.parametrize("size", [(48, 64), (8, 8), (40, 136), (64, 48)])
def test_any_size_that_is_a_multiple_of_the_patch(size):
    model = build().eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, *size))
    assert {name: tuple(x.shape) for name, x in logits.items()} == {
        name: (1, model.tasks[name].channels, *size) for name in NAMES
    }


def test_another_size_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"50×60.*multiples of 8.*56×64.*Predictor"):
        build()(torch.randn(1, 3, 50, 60))


def test_an_image_does_not_depend_on_its_neighbours_in_eval():
    model = build().eval()
    images = torch.randn(3, 3, 48, 64)
    with torch.no_grad():
        joined, alone = model(images), model(images[1:2])
    for name in NAMES:
        torch.testing.assert_close(joined[name][1:2], alone[name], rtol=1e-4, atol=1e-5)


def test_stages_are_the_blocks_outputs_of_the_timm_model(form):
    torch.manual_seed(0)
    ours = form(create_backbone(replace(BACKBONE, out_indices=(0, 2), depth=3), (32, 48)).eval())
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0
    ).eval()
    vit.load_state_dict(ours.vit.state_dict())
    outputs = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    image = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        final = vit.forward_features(image)
        stages = ours(image)
    for stage, tokens in zip(stages, (outputs[0], final), strict=True):
        expected = tokens[:, 1:].transpose(1, 2).reshape(2, 32, 4, 6)
        torch.testing.assert_close(stage, expected)


def test_blocks_after_the_last_tap_are_not_built():
    vit = create_backbone(replace(BACKBONE, out_indices=(0, 1), depth=4), (32, 32)).vit
    assert len(vit.blocks) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet18"}, "plain"),
        ({"name": "vit_tinny"}, "knows no model 'vit_tinny'"),
        ({"out_indices": (1, 0)}, "increasing block numbers from 0 to 1"),
        ({"out_indices": (0, 8)}, "increasing block numbers from 0 to 1"),
    ],
)
def test_a_backbone_that_cannot_be_is_told(change, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(replace(BACKBONE, **change), (32, 32))


def test_a_width_without_whole_groups_is_told():
    with pytest.raises(ConfigError, match="multiple of 32"):
        build(replace(DECODER, width=40))


def test_top_k_beyond_the_experts_is_told():
    with pytest.raises(ConfigError, match="found 16, expected 1 to"):
        build(replace(DECODER, experts=ExpertsConfig(top_k=16)))


def test_delta_starts_log_uniform_and_a_at_minus_one_to_n():
    torch.manual_seed(0)
    pame = PAME(PAMMConfig(width=256, state_size=6), tasks=3)
    step = F.softplus(pame.delta_bias.detach())
    assert step.min() >= 1e-3 * 0.99 and step.max() <= 1e-1 * 1.01
    assert abs(float(step.log().mean()) - np.log(1e-2)) < 0.1
    torch.testing.assert_close(torch.exp(pame.A_log), torch.arange(1.0, 7.0).expand(3, 512, 6))
    assert torch.equal(pame.D, torch.ones(3, 512))
    assert all(getattr(p, "_no_weight_decay", False) for p in (pame.A_log, pame.D, pame.prior_B.prior))


@pytest.mark.parametrize(("recipe", "width", "state_size"), [("pascal-pamm-l", 1024, 64), ("nyud-pamm-b", 768, 16)])
def test_the_papers_recipes_build_at_full_size(recipe, width, state_size):
    experiment = get_recipe(recipe)
    backbone = replace(experiment.model.backbone, pretrained=False)
    tasks = {name: create_task(name) for name in experiment.tasks}
    model = build_model(replace(experiment.model, backbone=backbone), tasks, experiment.data.size, "meta")
    assert len(model.decoder.pame) == 4
    assert model.decoder.pame[0].A_log.shape == (len(tasks), 2 * width, state_size)


def test_a_bf16_forward_is_close_to_float32():
    model = build().eval()
    image = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        exact = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(image)
    for name in NAMES:
        assert (exact[name] - rough[name]).abs().max() < 0.05 * exact[name].abs().max(), name
