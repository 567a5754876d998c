"""The released PAMM: its switches, its constants, what training does; its outputs are compared in tests/official."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pamm.command_line import parse_experiment
from pamm.config.experiment import ExpertsConfig, ModelConfig, PAMMConfig, ReleasedConfig
from pamm.config.recipes import VARIANTS, get_recipe
from pamm.config.strict import ConfigError, from_dict, to_dict
from pamm.models.backbone import create_backbone
from pamm.models.pamm_released import ReleasedDecoder, ReleasedExperts
from pamm.models.registry import build_model
from pamm.models.saved import load_model
from pamm.nn.router import SpatialRouter, resize_positions
from pamm.nn.serialize import scan_orders
from pamm.tasks import create_task
from pamm.training.run import train
from tiny import BACKBONE, experiment

DECODER = ReleasedConfig(width=32, state_size=4, experts=ExpertsConfig(count=5, top_k=3, rank=2), kernel_size=3)
NAMES = ("semseg", "depth", "normals")
SWITCHES = {
    "as published": {},
    "no experts on B": {"experts": replace(DECODER.experts, B=False)},
    "no experts": {"experts": replace(DECODER.experts, B=False, C=False), "projection_bias": True},
    "no task convolution": {"task_conv": False},
    "two snake orders": {"scan": "snake", "orders": 2},
}
WITHOUT_EFFECT = ("positions_bias", "shared.bias", *(f"heads.{name}.conv.bias" for name in NAMES))
"""Biases that the normalisation after them takes away: a gradient of rounding errors at most."""


def build(size=(48, 64), **changes):
    torch.manual_seed(0)
    backbone = replace(BACKBONE, class_token=False, drop_path_rate=0.0)
    config = ModelConfig(backbone, replace(DECODER, **changes))
    return build_model(config, {name: create_task(name) for name in NAMES}, size)


def image(*size, batch=2):
    return torch.linspace(-2, 2, batch * 3 * size[0] * size[1]).sin().view(batch, 3, *size) * 2


def run(model, size=(48, 64)):
    with torch.no_grad():
        return model(image(*size))


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_parameter_gets_a_gradient_and_the_constants_are_listed(switch):
    model = build(**SWITCHES[switch]).train()
    logits = model(torch.randn(8, 3, 48, 64))
    sum((x * torch.randn_like(x)).sum() for x in logits.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    zero = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.abs().sum() > 0]
    assert without == []
    assert [name for name in zero if not name.endswith(WITHOUT_EFFECT)] == []
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    constants = {name for name, _ in model.named_buffers() if not name.endswith(statistics)}
    names = ("A_log", "D", "B.prior", "C.prior")
    assert constants == {f"decoder.stages.{s}.{name}" for s in range(len(model.decoder.stages)) for name in names}


@pytest.mark.slow
def test_training_lowers_every_loss(tmp_path):
    base = experiment(str(tmp_path / "rooms"), steps=40, batch=8, warmup=5, lr=2e-3, optimizer="adamw")
    model = ModelConfig(replace(BACKBONE, class_token=False), DECODER)
    settings = replace(base, model=model, data=replace(base.data, images=(8, 1)))
    train(settings, tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [line for line in lines if line["kind"] == "train"]
    for name in settings.tasks:
        first = sum(entry[f"loss/{name}"] for entry in losses[:5])
        last = sum(entry[f"loss/{name}"] for entry in losses[-5:])
        assert last < 0.95 * first, f"{name}: {first / 5} → {last / 5}"
    trained = load_model(tmp_path / "run")
    assert torch.equal(trained.decoder.stages[0].D, torch.ones(6, 64))


def plain_experts(block: ReleasedExperts, task: str, x: torch.Tensor) -> torch.Tensor:
    """One task and one image, x (1, e, h, w): router and every expert in a loop, as the published equations read."""
    router, (rows, columns) = block.routers[task], x.shape[-2:]
    hidden = router.channel(x.flatten(2).transpose(1, 2))
    channel = router.channel_out(hidden).mean(1)
    summed = (
        sum(router.positions[i, j] * x[:, :, i, j] for i in range(rows) for j in range(columns)) + router.positions_bias
    )
    scores = router.scores(torch.cat([channel, router.spatial(summed)], dim=1))[0]
    weights = scores[: len(block.reduce)].softmax(0)
    chosen = weights.argsort(descending=True)[: router.top_k].tolist()
    mixture = 0
    for k in chosen:
        low = F.conv2d(x, block.reduce[k], block.reduce_bias[k], padding=block.padding)
        mixture = mixture + weights[k] * F.conv2d(low, block.restore[k][:, :, None, None], block.restore_bias[k])
    own = block.task_restore[task](block.task_reduce[task](x))
    return block.norm[task](block.norm_experts[task](mixture) + scores[-1] * own + block.general(x.detach()))


def test_experts_equal_a_loop_over_them_with_the_gradient_stopped_before_the_general_path():
    torch.manual_seed(1)
    block = ReleasedExperts(["a", "b"], 16, (3, 4), DECODER).eval()
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    block.prior.normal_()
    x = torch.randn(2, 3, 16, 3, 4, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    ours = block(x)
    plain = torch.stack(
        [
            torch.cat([plain_experts(block, task, one[None]) for one in twin[t]]) + block.prior[t, :, None, None]
            for t, task in enumerate("ab")
        ]
    )
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(ours)
    parameters = list(block.parameters())
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), [x, *parameters]),
        torch.autograd.grad((plain * weight).sum(), [twin, *parameters], allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-3, atol=1e-4)


def test_router_keeps_the_largest_weights_and_its_noise_acts_in_training_alone():
    torch.manual_seed(0)
    router = SpatialRouter(16, (3, 4), experts=7, top_k=4)
    x = torch.randn(1, 16, 3, 4).expand(5, 16, 3, 4)
    noisy, mix = router.train()(x)
    assert ((noisy > 0).sum(1) == 4).all() and not torch.allclose(noisy[0], noisy[1])
    clean, same = router.eval()(x)
    assert torch.equal(clean[0], clean[1]) and torch.equal(mix, same)
    every = SpatialRouter(16, (3, 4), experts=7, top_k=7).eval()
    every.load_state_dict(router.state_dict())
    full = every(x)[0]
    torch.testing.assert_close(full.sum(1), torch.ones(5))
    torch.testing.assert_close(clean, torch.where(full >= full.topk(4).values[:, -1:], full, 0.0))


def test_weights_of_positions_keep_their_scale_at_another_size():
    weight = torch.randn(6, 8) + 3
    for size in ((12, 16), (3, 4), (9, 5)):
        resized = resize_positions(weight, size)
        assert resized.shape == size
        assert float(resized.sum()) == pytest.approx(float(weight.sum()), rel=0.05)
    flat = resize_positions(torch.ones(6, 8), (12, 16))
    torch.testing.assert_close(flat, torch.full((12, 16), 0.25))
    assert resize_positions(weight, (6, 8)) is weight


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (8, 8), (40, 136)])
def test_any_size_that_is_a_multiple_of_the_patch(size):
    assert all(x.shape[-2:] == size and x.isfinite().all() for x in run(build().eval(), size).values())


def test_an_image_does_not_depend_on_its_neighbours_in_eval():
    model = build().eval()
    images = torch.randn(3, 3, 48, 64)
    with torch.no_grad():
        joined, alone = model(images), model(images[1:2])
    for name in NAMES:
        torch.testing.assert_close(joined[name][1:2], alone[name], rtol=1e-4, atol=1e-5)


def test_the_sequence_holds_no_class_token():
    backbone = create_backbone(replace(BACKBONE, class_token=False), (48, 64))
    assert backbone.grid == (6, 8) and backbone.vit.pos_embed.shape == (1, 48, 32)
    assert not any("cls_token" in name for name in backbone.state_dict())
    with_token = create_backbone(BACKBONE, (48, 64))
    shared = {name: value for name, value in backbone.vit.state_dict().items() if name != "pos_embed"}
    with_token.vit.load_state_dict(shared, strict=False)
    with torch.no_grad():
        with_token.vit.pos_embed[:, 1:] = backbone.vit.pos_embed
        stages, others = backbone.eval()(image(48, 64)), with_token.eval()(image(48, 64))
    assert all(stage.shape == (2, 32, 6, 8) for stage in stages)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(stages, others, strict=True))


@pytest.mark.parametrize("switch", SWITCHES)
def test_saved_and_loaded_it_gives_the_same_maps(switch, tmp_path):
    model = build(**SWITCHES[switch]).eval()
    with torch.no_grad():
        for name, constant in model.named_buffers():
            if name.endswith((".A_log", ".D", ".prior")):
                constant.add_(torch.randn_like(constant) * 0.1)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    for name, value in run(model).items():
        assert torch.equal(value, run(loaded)[name])


@pytest.mark.parametrize("scan", ["s-scan", "z-scan", ""])
def test_variants_of_the_recipes_scan_as_the_published_code_does(scan):
    """On the decoder's own grid, seen from outside; PAMM's recipes keep the paper's orders."""
    curve = {"s-scan": "snake", "z-scan": "morton", "": "hilbert"}[scan]
    released = "hilbert" if curve == "hilbert" else f"{curve}-released"
    variant = get_recipe("+".join(filter(None, ["nyud-pamm-released-l", scan]))).model.decoder.scan
    model, maps = build(scan=variant, size=(48, 80)), {}
    handles = model.decoder.observe(maps)
    run(model, (48, 80))
    for handle in handles:
        handle.remove()
    height, width = (side // BACKBONE.patch_size for side in (48, 80))
    found = torch.stack([maps[f"order/{k}"] for k in range(4)])
    assert torch.equal(found, scan_orders(released, height, width))
    assert curve == "hilbert" or not torch.equal(found, scan_orders(curve, height, width))


def test_settings_tell_the_decoders_apart():
    released, paper = ModelConfig(decoder=DECODER), ModelConfig()
    assert from_dict(ModelConfig, to_dict(released)) == released
    assert from_dict(ModelConfig, to_dict(paper)) == paper
    assert from_dict(ModelConfig, {"decoder": {"width": 96}}).decoder == PAMMConfig(width=96)
    with pytest.raises(ConfigError, match=r"decoder\.system: found 'pam', expected one of 'pamm', .*'pamm-released'"):
        from_dict(ModelConfig, {"decoder": {"system": "pam"}})
    with pytest.raises(ConfigError, match=r"unknown key 'decoder\.prior_B'"):
        from_dict(ModelConfig, {"decoder": {"system": "pamm-released", "prior_B": True}})
    with pytest.raises(ConfigError, match=r"decoder\.?: expected a mapping"):
        from_dict(ModelConfig, {"decoder": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 40}, "multiple of 32"),
        ({"kernel_size": 4}, "found 4, expected an odd number"),
        (
            {"scan": "snake", "orders": 5},
            r"decoder\.orders: found 5, expected 1 to 4: the published code's snake has no more",
        ),
        ({"scan": "morton", "orders": 8}, r"decoder\.orders: found 8, expected 1 to 4"),
        ({"experts": ExpertsConfig(count=5, top_k=9)}, r"found 9, expected 1 to decoder\.experts\.count = 5"),
    ],
)
def test_settings_that_no_network_has_are_told(change, message):
    with pytest.raises(ConfigError, match=message):
        ReleasedDecoder(replace(DECODER, **change), 32, (3, 4), 2, ["depth"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_applies_or_says_why_not(variant):
    if variant in ("baseline", "task-conv", "pame", "prior-b", "prior-c", "no-priors"):
        allowed = variant == "pame"  # without Task Convolution
        if not allowed:
            with pytest.raises(ConfigError, match=f"'{variant}' changes a setting that 'pamm-released' does not have"):
                get_recipe(f"pascal-pamm-released-l+{variant}")
            return
    assert get_recipe(f"pascal-pamm-released-l+{variant}").model != get_recipe("pascal-pamm-released-l").model


def test_the_command_line_sets_the_released_decoder():
    arguments = ["pascal-pamm-released-l", "--model.decoder.kernel_size", "5", "--model.decoder.experts.count", "12"]
    decoder = parse_experiment("train", arguments)[0].model.decoder
    assert isinstance(decoder, ReleasedConfig) and (decoder.kernel_size, decoder.experts.count) == (5, 12)


def test_a_bf16_forward_is_close_to_float32():
    model = build().eval()
    exact = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = run(model)
    for name in NAMES:
        assert (exact[name] - rough[name]).abs().max() < 0.1 * exact[name].abs().max(), name
