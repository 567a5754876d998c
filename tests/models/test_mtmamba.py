"""MTMamba and MTMamba++: what their switches do, their sizes in the papers' tables, and the promises of every variant.

Outputs and gradients are compared with the published implementation in tests/official/test_official_mtmamba.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from timm.models.swin_transformer import WindowAttention as TimmAttention
from torch.nn import functional as F

from pamm.command_line import parse_experiment
from pamm.config.experiment import BackboneConfig, ModelConfig, MTMambaConfig, dump, load
from pamm.config.recipes import MTMAMBA_VARIANTS, get_recipe
from pamm.config.strict import ConfigError, to_dict
from pamm.models.mtmamba import CTM, SS2D, DenseHead, MTMambaDecoder
from pamm.models.registry import build_model, rebuild_model
from pamm.nn.serialize import row_column_orders
from pamm.nn.task_layers import TaskDropPath, TaskLayerNorm
from pamm.nn.window_attention import WindowAttention
from pamm.runtime import distributed
from pamm.tasks import create_task
from pamm.training.run import train
from tiny import BACKBONE, DECODER, MTMAMBA, SWIN, experiment

NAMES = ("semseg", "depth", "normals")
SYSTEMS = ("mtmamba", "mtmamba++")


def build(decoder: MTMambaConfig = MTMAMBA, backbone: BackboneConfig = SWIN, names=NAMES, size=(64, 96)):
    torch.manual_seed(0)
    return build_model(ModelConfig(backbone, decoder), {name: create_task(name) for name in names}, size)


def switched(system: str, variant: str) -> MTMambaConfig:
    """The tiny decoder with what a variant changes."""
    derived = get_recipe(f"nyud-mtmamba+{variant}" if variant else "nyud-mtmamba").model.decoder
    return replace(derived, system=system, state_size=4, head_width=8, window_size=3)


# -- layers --------------------------------------------------------------------------------------------------------------


def test_ss2d_equals_the_recurrence_order_by_order():
    """Eq. 10-12 in plain loops, one task, image, order and position after another; Δ, B and C from a second map."""
    torch.manual_seed(0)
    scan = SS2D(tasks=2, channels=6, rank=2, state_size=3)
    x, source = torch.randn(2, 2, 2, 3, 2, 6).unbind(0)
    twin, other = x.clone().requires_grad_(), source.clone().requires_grad_()
    x.requires_grad_(), source.requires_grad_()
    expected = torch.zeros(2, 2, 6, 6)
    for task in range(2):
        for image in range(2):
            values, chosen = (m[task, image].flatten(0, 1) for m in (twin, other))
            for k, order in enumerate(row_column_orders(3, 2).tolist()):
                low, B, C = (chosen @ scan.select[task, k].T).split([2, 3, 3], dim=-1)
                step = F.softplus(low @ scan.delta[task, k].T + scan.delta_bias[task, k])
                A, state = -torch.exp(scan.A_log[task, k]), torch.zeros(6, 3)
                for p in order:
                    state = torch.exp(step[p][:, None] * A) * state + (step[p] * values[p])[:, None] * B[p]
                    expected[task, image, p] = expected[task, image, p] + state @ C[p] + scan.D[task, k] * values[p]
    ours = scan(x, source)
    torch.testing.assert_close(ours.flatten(2, 3), expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(expected)
    parameters = dict(scan.named_parameters())
    mine = torch.autograd.grad((ours.flatten(2, 3) * weight).sum(), [x, source, *parameters.values()])
    plain = torch.autograd.grad((expected * weight).sum(), [twin, other, *parameters.values()])
    for name, a, b in zip(["x", "source", *parameters], mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_windowed_attention_is_swins_per_task_on_maps_padded_to_whole_windows():
    torch.manual_seed(0)
    ours = WindowAttention(tasks=2, channels=12, num_heads=3, window_size=4)
    x = torch.randn(2, 2, 6, 9, 12)
    for task in range(2):
        swin = TimmAttention(12, 3, window_size=4)
        layers = ours.query, ours.key, ours.value
        with torch.no_grad():
            swin.qkv.weight.copy_(torch.cat([layer.weight[task] for layer in layers]))
            swin.qkv.bias.copy_(torch.cat([layer.bias[task, 0] for layer in layers]))
            swin.proj.weight.copy_(ours.project.weight[task])
            swin.proj.bias.copy_(ours.project.bias[task, 0])
            swin.relative_position_bias_table.copy_(ours.bias[task].T)
        padded = F.pad(x[task], (0, 0, 0, 3, 0, 2))
        expected = torch.empty_like(padded)
        for top in (0, 4):
            for left in (0, 4, 8):
                window = padded[:, top : top + 4, left : left + 4]
                expected[:, top : top + 4, left : left + 4] = swin(window.flatten(1, 2)).view(window.shape)
        torch.testing.assert_close(ours(x)[task], expected[:, :6, :9], rtol=1e-4, atol=1e-6)


def test_windowed_attention_takes_queries_and_keys_from_the_source():
    """From a constant map all keys are equal, so that every position takes the mean of its window's values."""
    torch.manual_seed(0)
    attend = WindowAttention(tasks=1, channels=4, num_heads=2, window_size=2)
    with torch.no_grad():
        attend.bias.zero_()
    x = torch.randn(1, 1, 2, 4, 4)
    means = attend.project(attend.value(x).unflatten(3, (2, 2)).mean((2, 4)))  # (T, B, 2 windows, c)
    expected = means.repeat_interleave(2, dim=2)[:, :, None].expand(x.shape)
    torch.testing.assert_close(attend(x, torch.ones_like(x)), expected)
    assert not torch.allclose(attend(x), expected)


def test_each_task_has_its_own_norm():
    norm = TaskLayerNorm(2, 3)
    with torch.no_grad():
        norm.weight[1], norm.bias[1] = 2.0, 5.0
    x = torch.randn(2, 4, 5, 3)
    for task, (weight, bias) in enumerate(((1.0, 0.0), (2.0, 5.0))):
        torch.testing.assert_close(norm(x)[task], F.layer_norm(x[task], (3,)) * weight + bias)


def test_paths_are_dropped_per_task_and_image_and_the_mean_is_kept():
    drop = TaskDropPath(0.25).train()
    x = torch.ones(3, 2000, 2, 2)
    torch.manual_seed(0)
    kept = drop(x)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(kept.amin((2, 3)), kept.amax((2, 3)))
    assert not torch.equal(kept[0], kept[1])
    assert abs(kept.mean().item() - 1) < 0.03
    assert torch.equal(drop.eval()(x), x)


def test_dropped_paths_are_those_of_the_joined_batch(monkeypatch):
    """Two processes with half of the images each draw what one process draws for all of them."""
    drop = TaskDropPath(0.5).train()
    x = torch.ones(3, 8, 2)
    torch.manual_seed(0)
    whole, halves = drop(x), []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        halves.append(drop(x[:, :4]))
    assert torch.equal(torch.cat(halves, 1), whole)


def test_the_dense_heads_shuffle_may_come_last():
    """Against the paper's order: patch expanding to the full resolution, norm there, then the Linear."""
    torch.manual_seed(0)
    head = DenseHead(4, 3)
    feature = torch.randn(2, 4, 2, 3)
    large = head.expand(feature.permute(0, 2, 3, 1)).view(2, 2, 3, 4, 4, 4)  # rows, columns, row, column, channel
    large = large.permute(0, 1, 3, 2, 4, 5).reshape(2, 8, 12, 4)
    torch.testing.assert_close(head(feature), head.predict(head.norm(large)).permute(0, 3, 1, 2))


# -- switches ------------------------------------------------------------------------------------------------------------


SWITCHED = [
    (system, variant)
    for system in SYSTEMS
    for variant in ("", *MTMAMBA_VARIANTS)
    if not variant.startswith("swin")
    and not (system == "mtmamba++" and variant.startswith("gate"))  # it has no such gate
]


@pytest.mark.parametrize(("system", "variant"), SWITCHED)
def test_every_parameter_of_every_variant_gets_a_gradient(system, variant):
    decoder = replace(switched(system, variant), drop_path_rate=0.0)  # a dropped path has no gradient
    model = build(decoder, replace(SWIN, drop_path_rate=0.0)).train()
    logits = model(torch.randn(2, 3, 64, 96))
    sum((x * torch.randn_like(x)).sum() for x in logits.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    statistics = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index", "attn_mask")
    assert [
        name for name, _ in model.named_buffers() if not name.endswith(statistics)
    ] == []  # nothing is held constant


def test_a_fixed_gate_is_the_learned_one_at_its_limit():
    torch.manual_seed(0)
    learned = CTM(MTMAMBA, tasks=2, channels=8, drop_path=0.0)
    z = torch.randn(2, 1, 3, 4, 8)
    for value in (0.0, 0.3, 1.0):
        fixed = CTM(replace(MTMAMBA, ctm_gate=value), tasks=2, channels=8, drop_path=0.0)
        fixed.load_state_dict({k: v for k, v in learned.state_dict().items() if k in fixed.state_dict()})
        limit = math.inf if value == 1 else -math.inf if value == 0 else math.log(value / (1 - value))
        handle = learned.gate.register_forward_hook(lambda m, i, out, limit=limit: torch.full_like(out, limit))
        torch.testing.assert_close(fixed(z), learned(z))
        handle.remove()


def test_switches_remove_what_they_name():
    def parts(**changes):
        decoder = build(replace(MTMAMBA, **changes)).decoder
        return {".".join(key.split(".")[2:4]) for key in decoder.state_dict()}

    assert {"ctm.extract_shared", "ctm.extract", "ctm.gate", "stm.1"} <= parts()
    assert not any("ctm" in part for part in parts(ctm=False))
    assert "stm.0" in parts(stm=1) and "stm.1" not in parts(stm=1) and "stm.2" in parts(stm=3)
    assert not {"ctm.extract_shared", "ctm.norm_shared", "ctm.gate"} & parts(ctm_gate=0.0)
    assert not {"ctm.extract", "ctm.norm", "ctm.gate"} & parts(ctm_gate=1.0)


@pytest.mark.parametrize(("stm", "ctm"), [(2, True), (3, False), (1, True)])
def test_depth_of_dropping_falls_linearly_to_zero(stm, ctm):
    decoder = build(replace(MTMAMBA, stm=stm, ctm=ctm)).decoder
    rates = [m.drop_prob for m in decoder.modules() if isinstance(m, TaskDropPath)]
    assert rates == pytest.approx(torch.linspace(0.2, 0, 3 * (stm + ctm)).tolist())


@pytest.mark.parametrize(
    ("recipe", "millions"),
    [
        ("nyud-mtmamba+swin-blocks", 303.18),
        ("nyud-mtmamba+stm-1", 252.51),
        ("nyud-mtmamba+stm-2", 276.48),
        ("nyud-mtmamba+stm-3", 300.45),
        ("nyud-mtmamba", 307.99),
        ("nyud-mtmamba+attention", 451.81),
        ("nyud-mtmamba+attention-gate", 345.33),
    ],
)
def test_parameters_are_those_of_the_papers_tables(recipe, millions):
    """Tables 2, 3 and 4, which cut the millions off after two decimals."""
    config = get_recipe(recipe)
    classes = {"semseg": {"classes": list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN")}}
    tasks = {name: create_task(name, **classes.get(name, {})) for name in config.tasks}
    network = replace(config.model, backbone=replace(config.model.backbone, pretrained=False))
    model = build_model(network, tasks, config.data.size, "meta")
    assert math.floor(sum(p.numel() for p in model.parameters()) / 1e4) / 100 == millions


# -- recipes -------------------------------------------------------------------------------------------------------------

LOG = {"train.scheme": "log_sum", "tasks.edge.weight": 1.0, "tasks.normals.weight": 1.0}
SETTINGS = {
    "nyud-mtmamba": LOG
    | {"train.steps": 50_000, "train.lr": 1e-4, "train.weight_decay": 1e-5, "data.size": [448, 576]},
    "pascal-mtmamba": LOG
    | {"train.steps": 50_000, "train.lr": 1e-4, "train.weight_decay": 1e-5, "data.size": [512, 512]},
    "nyud-mtmamba-plus": {
        "train.steps": 40_000,
        "train.lr": 2e-5,
        "train.weight_decay": 1e-6,
        "train.scheme": "sum",
        "tasks.normals.weight": 10.0,
        "tasks.edge.weight": 50.0,
    },
    "pascal-mtmamba-plus": LOG | {"train.steps": 40_000, "train.lr": 8e-5, "train.weight_decay": 1e-6},
    "cityscapes-mtmamba": {
        "train.steps": 40_000,
        "train.lr": 1e-4,
        "train.weight_decay": 1e-6,
        "train.scheme": "log_sum",
    },
    "cityscapes-mtmamba-plus": {"train.steps": 40_000, "train.lr": 1e-4, "model.decoder.system": "mtmamba++"},
}


@pytest.mark.parametrize("recipe", SETTINGS)
def test_recipes_hold_the_published_settings(recipe):
    shared = {
        "train.batch": 8,
        "train.optimizer": "adamw",
        "train.clip": None,
        "train.power": 0.9,
        "model.backbone.drop_path_rate": 0.1,
        "model.decoder.drop_path_rate": 0.2,
        "model.decoder.system": "mtmamba++" if recipe.endswith("plus") else "mtmamba",
    }
    if not recipe.startswith("cityscapes"):
        shared["tasks.edge.options.positive_weight"] = 0.95
    for path, expected in (shared | SETTINGS[recipe]).items():
        node = to_dict(get_recipe(recipe))
        for key in path.split("."):
            node = node[key]
        assert node == expected, path


@pytest.mark.parametrize("variant", MTMAMBA_VARIANTS)
def test_every_variant_changes_the_experiment_and_survives_its_file(variant, tmp_path):
    derived = get_recipe(f"pascal-mtmamba+{variant}")
    others = [get_recipe(f"pascal-mtmamba+{v}" if v else "pascal-mtmamba").model for v in ("", *MTMAMBA_VARIANTS)]
    assert others.count(derived.model) == 1 and derived.model != others[0]
    dump(derived, tmp_path / "experiment.yaml")
    assert load(tmp_path / "experiment.yaml") == derived


def test_the_command_line_sets_leaves_of_this_decoder():
    derived, _ = parse_experiment(
        "train", ["nyud-mtmamba", "--model.decoder.stm", "3", "--model.decoder.ctm-gate", "1"]
    )
    assert derived.model.decoder == MTMambaConfig(stm=3, ctm_gate=1.0)


def test_a_variant_of_the_other_paper_is_told():
    with pytest.raises(ConfigError, match=r"unknown variant 'top-3' of 'nyud-mtmamba'.*Known: stm-1, stm-2"):
        get_recipe("nyud-mtmamba+top-3")
    with pytest.raises(ConfigError, match=r"unknown variant 'swin-t' of 'nyud-pamm-b'.*Known: baseline"):
        get_recipe("nyud-pamm-b+swin-t")


# -- promises ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("size", [(64, 96), (32, 32), (96, 64)])
def test_any_size_that_is_a_multiple_of_the_last_stride(system, size):
    model = build(replace(MTMAMBA, system=system)).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, *size))
        larger = model(torch.randn(1, 3, *size), (2 * size[0], 2 * size[1]))
    assert {n: tuple(x.shape) for n, x in logits.items()} == {n: (1, model.tasks[n].channels, *size) for n in NAMES}
    assert all(x.shape[-2:] == (2 * size[0], 2 * size[1]) for x in larger.values())


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_image_does_not_depend_on_its_neighbours_in_eval(system):
    model = build(replace(MTMAMBA, system=system)).eval()
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        joined, alone = model(images), model(images[1:2])
    for name in NAMES:
        torch.testing.assert_close(joined[name][1:2], alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_cross_task_block_lets_tasks_see_each_other(system):
    for ctm in (True, False):
        model = build(replace(MTMAMBA, system=system, ctm=ctm)).eval()
        image = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            before = model(image)
            model.decoder.stages[0].reduce.bias[0].add_(torch.randn(64))  # the first task's features alone
            after = model(image)
        assert not torch.allclose(before["semseg"], after["semseg"])
        assert torch.equal(before["depth"], after["depth"]) is not ctm


@pytest.mark.parametrize("system", SYSTEMS)
def test_settings_rebuild_the_network(system):
    model = build(replace(MTMAMBA, system=system, stm=1, ctm_gate=0.5 if system == "mtmamba" else None)).eval()
    again = rebuild_model(json.loads(json.dumps(model.settings))).eval()
    again.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for name, x in model(image).items():
            assert torch.equal(x, again(image)[name])


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_bf16_forward_is_close_to_float32(system):
    model = build(replace(MTMAMBA, system=system)).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        exact = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(image)
    for name in NAMES:
        assert (exact[name] - rough[name]).abs().max() < 0.05 * exact[name].abs().max(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stm": 0}, r"decoder\.stm: found 0, expected a number from 1 to"),
        ({"drop_path_rate": 1.0}, r"decoder\.drop_path_rate: found 1\.0, expected a number from 0 to 0\.99"),
        ({"ctm_gate": 2.0}, r"decoder\.ctm_gate: found 2\.0"),
        ({"system": "mtmamba++", "ctm_gate": 0.0}, "mtmamba\\+\\+ has no such gate"),
    ],
)
def test_a_decoder_that_cannot_be_is_told(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(replace(MTMAMBA, **changes))


def test_decoders_and_backbones_that_do_not_fit_are_told():
    with pytest.raises(ConfigError, match="MTMamba's decoder needs stages of falling resolution"):
        build(MTMAMBA, BACKBONE)
    with pytest.raises(ConfigError, match="this decoder needs stages of one size"):
        build(DECODER, SWIN)
    with pytest.raises(ConfigError, match=r"found channels \[16, 64\]; choose .* neighbouring"):
        build(MTMAMBA, replace(SWIN, out_indices=(0, 2)))


def test_stage_maps_of_other_shapes_are_told():
    decoder = MTMambaDecoder(MTMAMBA, (8, 16), ["depth"])
    with pytest.raises(ValueError, match=r"\(8, 5, 6\), \(16, 2, 3\)\], expected .*\[\(8, 4, 6\), \(16, 2, 3\)\]"):
        decoder([torch.zeros(1, 8, 5, 6), torch.zeros(1, 16, 2, 3)])


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_short_training_lowers_every_loss(system, tmp_path):
    scheme = {"mtmamba": "log_sum", "mtmamba++": "sum"}[system]
    base = experiment(
        str(tmp_path / "data"), steps=30, batch=4, lr=2e-3, optimizer="adamw", scheme=scheme, save_every=0x7FFF
    )
    model = ModelConfig(SWIN, replace(MTMAMBA, system=system, drop_path_rate=0.05))
    data = replace(base.data, size=(64, 64), images=(8, 2), scale=(1.0, 1.0), flip=0.0, color=False)
    train(replace(base, model=model, data=data), tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = {name: [line[f"loss/{name}"] for line in lines if line["kind"] == "train"] for name in base.tasks}
    for name, values in losses.items():
        assert len(values) == 30 and sum(values[-4:]) < 0.9 * sum(values[:4]), (name, values)
