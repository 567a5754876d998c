"""Checkpoints of the published MTMamba and MTMamba++: outputs, maps and gradients of the published code; names; damage."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import golden
from pamm.build import create_tasks
from pamm.cli import main
from pamm.config.experiment import BackboneConfig, DataConfig, ModelConfig, MTMambaConfig
from pamm.config.recipes import get_recipe
from pamm.data import dataset_options
from pamm.models.registry import build_model
from pamm.models.saved import load_model
from pamm.official import OfficialError, gradients, intermediates, load
from pamm.official.mtmamba import layout
from pamm.prediction import Predictor
from pamm.tasks import create_task
from tiny import MTMAMBA, SWIN

SYSTEMS = ("mtmamba", "mtmamba++")


@pytest.fixture(params=("mtmamba_nyud", "mtmamba_plus_pascal"))
def published_case(request) -> golden.GoldenCase:
    return golden.GoldenCase(request.param)


def published(model, system: str) -> dict[str, torch.Tensor]:
    """The network's weights under the published names, with the Swin's index buffers."""
    own = model.state_dict()
    state = {key: place.collect(own).clone() for key, place in layout(model, system)}
    if hasattr(model.backbone, "swin"):
        for i, layer in enumerate(model.backbone.swin.layers):
            for j, block in enumerate(layer.blocks):
                name = f"backbone.stages.{i}.blocks.{j}.attn.w_msa.relative_position_index"
                state[name] = block.attn.relative_position_index.clone()
    return state


def build(system="mtmamba", names=("semseg", "depth"), backbone=SWIN, **changes):
    torch.manual_seed(0)
    decoder = replace(MTMAMBA, system=system, **changes)
    model = build_model(ModelConfig(backbone, decoder), {name: create_task(name) for name in names}, (64, 128)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


# -- the published implementations -------------------------------------------------------------------------------------------


def test_outputs_and_maps_are_the_published_ones(published_case, form):
    case = published_case
    model = form(load(case.state, image_size=case.image_size))
    assert list(model.tasks) == case.tasks and not model.training
    assert {name: task.channels for name, task in model.tasks.items()} == case.facts["num_output"]
    with torch.no_grad(), intermediates(model) as maps:
        logits = model.decode(case.features(), case.image_size)
    found = {f"mid/{name}": value for name, value in maps.items()}
    found |= {f"output/{name}": value for name, value in logits.items()}
    assert found.keys() == set(case.maps())
    for name, value in found.items():
        assert case.deviation(name, value) < 1e-5, name


def test_gradients_are_the_published_ones_under_their_names(published_case, form):
    case = published_case
    model = form(load(case.state, image_size=case.image_size), training=True)
    case.loss(model.decode(case.features(), case.image_size)).backward()
    ours = gradients(model)
    assert ours.keys() == case.state.keys()
    for key, gradient in ours.items():
        expected = case.facts["grad_norm"].get(key)
        assert (gradient is None) == (expected is None), key
        if gradient is not None:
            assert gradient.shape == case.state[key].shape
            assert gradient.norm().item() == pytest.approx(expected, rel=1e-3), key


@pytest.mark.parametrize(
    ("recipe", "manifest", "parameters"),
    [
        ("nyud-mtmamba", "mtmamba_nyud", 307_999_137),
        ("pascal-mtmamba", "mtmamba_pascal", 335_858_326),
        ("nyud-mtmamba-plus", "mtmamba_plus_nyud", 315_021_249),
        ("pascal-mtmamba-plus", "mtmamba_plus_pascal", 343_231_606),
    ],
)
def test_recipes_have_the_published_keys_shapes_and_sizes(recipe, manifest, parameters):
    listed = golden.manifest(f"{manifest}_swinl")
    experiment = get_recipe(recipe)
    config = replace(experiment.model, backbone=replace(experiment.model.backbone, pretrained=False))
    model = build_model(config, create_tasks(experiment), experiment.data.size, "meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    state = published(model, config.decoder.system)
    decoder = {key: list(value.shape) for key, value in state.items() if not key.startswith("backbone.")}
    assert decoder == listed["state"]
    loaded = load(state, image_size=experiment.data.size)
    assert loaded.load_report.parameters == parameters
    same = to_sizes(loaded.settings["model"]["backbone"])
    assert same == {
        "embed_dim": 192,
        "depths": [2, 2, 18, 2],
        "num_heads": [6, 12, 24, 48],
        "window_size": 12,
        "patch_size": 4,
    }
    assert loaded.settings["model"]["decoder"] == model.settings["model"]["decoder"]
    backbone = {key: tuple(value.shape) for key, value in state.items() if key.startswith("backbone.")}
    block = "backbone.stages.3.blocks.1."
    assert backbone[f"{block}attn.w_msa.relative_position_bias_table"] == (529, 48)
    assert backbone[f"{block}attn.w_msa.relative_position_index"] == (144, 144)
    assert backbone[f"{block}ffn.layers.0.0.weight"] == (6144, 1536) and f"{block}ffn.layers.1.bias" in backbone
    assert backbone["backbone.stages.0.downsample.reduction.weight"] == (384, 768) and "backbone.norm3.bias" in backbone
    assert (
        backbone["backbone.patch_embed.projection.weight"] == (192, 3, 4, 4)
        and "backbone.patch_embed.norm.bias" in backbone
    )
    assert not any("stages.3.downsample" in key or "norm4" in key for key in backbone)


def to_sizes(backbone: dict) -> dict:
    return {key: backbone[key] for key in ("embed_dim", "depths", "num_heads", "window_size", "patch_size")}


# -- any network of this kind ------------------------------------------------------------------------------------------------

NETWORKS = {
    "mtmamba": {},
    "mtmamba++": {"system": "mtmamba++"},
    "tasks in another order": {"names": ("edge", "human_parts", "semseg")},
    "one task": {"names": ("normals",), "system": "mtmamba++"},
    "three STM, no CTM": {"stm": 3, "ctm": False},
    "one STM, no S-CTM": {"stm": 1, "ctm": False, "system": "mtmamba++"},
    "other sizes": {"expand": 3, "state_size": 5},
    "other sizes, plus": {"expand": 1, "state_size": 7, "head_width": 20, "system": "mtmamba++"},
    "other Swin": {
        "backbone": replace(
            SWIN, embed_dim=24, depths=(2, 1, 1, 3), num_heads=(3, 2, 4, 6), window_size=3, patch_size=8, mlp_ratio=3.0
        )
    },
    "three stages of a Swin": {"backbone": replace(SWIN, out_indices=(0, 1, 2))},
    "no backbone": {"backbone": BackboneConfig("none", False, (0, 1, 2, 3), embed_dim=8), "system": "mtmamba++"},
    "no backbone, two stages": {"backbone": BackboneConfig("none", False, (0, 1, 2), embed_dim=24)},
}


def test_wrappers_parts_of_names_are_taken_off_and_equal_names_refused():
    model = build(**next(iter(NETWORKS.values())))
    state = published(model, model.settings["model"]["decoder"]["system"])
    for prefix in ("module.", "model.", "_orig_mod.", "model.module._orig_mod.", "_orig_mod.module."):
        loaded = load({"state_dict": {prefix + key: value for key, value in state.items()}}, image_size=(64, 128))
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    key = next(iter(state))
    with pytest.raises(OfficialError, match="two weights of one name"):
        load(state | {f"module.{key}": state[key]})


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_returns_from_its_published_names(name, tmp_path):
    """Everything is told from keys and shapes; the folder it is saved to gives it back."""
    model = build(**NETWORKS[name])
    system = model.settings["model"]["decoder"]["system"]
    state = published(model, system)
    sizes = {key: (tuple(v.shape), v.dtype) for key, v in state.items()}
    own = model.state_dict()
    assert sum(v.numel() for k, v in state.items() if not k.endswith("index")) == sum(v.numel() for v in own.values())
    loaded = load({"model": {f"module.{key}": value for key, value in state.items()}}, image_size=(64, 128))
    assert {
        k: v
        for k, v in loaded.settings["model"]["decoder"].items()
        if k not in ("drop_path_rate", "window_size", "head_width")
    } == {
        k: v
        for k, v in model.settings["model"]["decoder"].items()
        if k not in ("drop_path_rate", "window_size", "head_width")
    }
    assert list(loaded.tasks) == list(model.tasks)
    assert loaded.state_dict().keys() == own.keys()
    assert all(torch.equal(value, own[key]) for key, value in loaded.state_dict().items())
    loaded.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    height, width = 64 // again.backbone.output_stride, 128 // again.backbone.output_stride
    channels = again.backbone.channels
    maps = [
        torch.randn(1, c, height << s, width << s)
        for s, c in zip(reversed(range(len(channels))), channels, strict=True)
    ]
    with torch.no_grad():
        for task, logits in model.decode(maps, (64, 128)).items():
            assert torch.equal(again.decode(maps, (64, 128))[task], logits)
    assert {key: (tuple(v.shape), v.dtype) for key, v in published(again, system).items()} == sizes


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_format_that_sorts_the_keys_does_not_change_the_order_of_the_tasks(system, tmp_path):
    """safetensors sorts by data type first: integers (index buffers, BatchNorm's counter) stand before the rest."""
    model = build(system, names=("semseg", "depth", "edge"))
    state = {key: value.contiguous() for key, value in published(model, system).items()}
    save_file(state, tmp_path / "weights.safetensors")
    loaded = load(tmp_path / "weights.safetensors", image_size=(64, 128))
    assert list(loaded.tasks) == ["semseg", "depth", "edge"]
    assert "keys are sorted" in str(loaded.load_report)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_command_line_imports_what_the_predictor_runs(system, tmp_path, capsys):
    model = build(system)
    torch.save({"model": {f"module.{k}": v for k, v in published(model, system).items()}}, tmp_path / "checkpoint.pth")
    folder = tmp_path / "model"
    sizes = ["--image-size", "64", "128"]
    assert main(["import", str(tmp_path / "checkpoint.pth"), "--out", str(folder), *sizes]) == 0
    assert f"{system}: " in capsys.readouterr().out
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    ours, imported = Predictor(model)(image), Predictor(folder)(image)
    assert {task: imported[task].shape for task in imported} == {"semseg": (50, 70), "depth": (50, 70)}
    for task in imported:
        assert np.array_equal(imported[task], ours[task])


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_report_tells_of_every_key(system):
    state = published(build(system), system)
    report = load(state, image_size=(64, 128)).load_report
    assert report.system == system and report.missed == {}
    assert report.used.keys() | report.ignored.keys() == state.keys() and not report.used.keys() & report.ignored.keys()
    assert all(key.endswith("relative_position_index") for key in report.ignored) and len(report.ignored) == 5
    assert re.search(rf"{re.escape(system)}: {len(report.used)} tensors used, 5 ignored, 0 missed", str(report))


@pytest.mark.parametrize("system", SYSTEMS)
def test_patch_merging_reads_its_neighbours_in_the_checkpoints_order(system):
    """MMSegmentation's layer, from its own operations: unfold (channel by channel, rows first), LayerNorm, Linear."""
    torch.manual_seed(0)
    state = published(build(system), system)
    for key in (key for key in state if ".downsample." in key):
        state[key] = torch.randn_like(state[key])
    model = load(state, image_size=(64, 128))
    for stage in range(3):
        names = f"backbone.stages.{stage}.downsample"
        norm, bias, reduce = (state[f"{names}.{n}"] for n in ("norm.weight", "norm.bias", "reduction.weight"))
        x = torch.randn(2, 6, 10, len(norm) // 4)
        merged = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
        expected = F.layer_norm(merged, norm.shape, norm, bias) @ reduce.T
        ours = model.backbone.swin.layers[stage + 1].downsample(x)
        torch.testing.assert_close(ours.flatten(1, 2), expected, rtol=1e-3, atol=1e-4)


def test_names_of_the_swin_and_of_its_blocks():
    """A value written under a published name arrives where it acts."""
    model = build()
    state = published(model, "mtmamba")
    pairs = {
        "backbone.norm2.weight": model.backbone.norms[2].weight,
        "backbone.stages.2.blocks.1.attn.w_msa.qkv.bias": model.backbone.swin.layers[2].blocks[1].attn.qkv.bias,
        "backbone.stages.1.blocks.0.ffn.layers.1.weight": model.backbone.swin.layers[1].blocks[0].mlp.fc2.weight,
        "block_2.depth_1.op.in_proj.weight": torch.cat(
            [model.decoder.stages[1].stm[1].extract.expand.weight[1], model.decoder.stages[1].stm[1].gate.weight[1]]
        ),
        "block_3.2.in_proj.semseg.weight": model.decoder.stages[2].ctm.gate.weight[0],
        "block_3.0.op.depth.conv2d.weight": model.decoder.stages[0].ctm.extract.conv.conv.weight[128:],
        "concat_layers.depth_0.bias": model.decoder.stages[0].reduce.bias[1, 0],
        "final_project.depth.weight": model.heads["depth"].predict.weight[..., None, None],
    }
    for key, tensor in pairs.items():
        assert torch.equal(state[key], tensor), key


def test_sorted_keys_do_not_tell_the_tasks_order():
    """safetensors sorts its keys; then the benchmarks' order is taken, and the report says so."""
    names = ("semseg", "depth", "edge")
    model = build(names=names, backbone=BackboneConfig("none", False, (0, 1, 2, 3), embed_dim=8))
    state = published(model, "mtmamba")
    loaded = load({key: state[key] for key in sorted(state)}, image_size=(64, 128))
    assert list(loaded.tasks) == list(names)
    assert any("benchmarks' order" in notice for notice in loaded.load_report.notices)
    assert not any("benchmarks' order" in n for n in load(state, image_size=(64, 128)).load_report.notices)


def test_a_model_without_backbone_says_so():
    model = build(backbone=BackboneConfig("none", False, (0, 1, 2, 3), embed_dim=8))
    with pytest.raises(ValueError, match=r"no backbone: give its stage maps to model\.decode\(stages, size\)"):
        model(torch.zeros(1, 3, 64, 96))


def test_a_cityscapes_checkpoint_has_its_classes_and_its_disparity():
    described = dataset_options(DataConfig(name="cityscapes"))
    torch.manual_seed(0)
    tasks = {name: create_task(name, **described[name]) for name in ("semseg", "depth")}
    backbone = BackboneConfig("none", False, (0, 1, 2, 3), embed_dim=8)
    model = build_model(ModelConfig(backbone, MTMAMBA), tasks, (64, 128))
    loaded = load(published(model, "mtmamba"), image_size=(64, 128))
    assert {n: t.options() for n, t in loaded.tasks.items()} == {n: t.options() for n, t in tasks.items()}


def test_a_trained_import_decays_what_a_new_network_decays():
    model = build()
    loaded = load(published(model, "mtmamba"), image_size=(64, 128))
    flags = [{n for n, p in m.named_parameters() if getattr(p, "_no_weight_decay", False)} for m in (model, loaded)]
    assert flags[0] == flags[1] and flags[0]


# -- damage ------------------------------------------------------------------------------------------------------------------


def without(*keys):
    return lambda state: [state.pop(key) for key in keys]


def reshaped(key, *shape):
    return lambda state: state.update({key: torch.zeros(shape)})


INDEX = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"
DAMAGE = {
    "one lost": (without("block_1.depth_2.op.Ds"), r"1 missing, e\.g\. block_1\.depth_2\.op\.Ds"),
    "heads lost": (without("final_project.depth.weight"), r"missing, e\.g\. final_project\.depth\.weight"),
    "scan lost": (without("block_1.semseg_0.op.A_logs"), r"missing, e\.g\. block_1\.semseg_0\.op\.A_logs"),
    "backbone cut": (without("backbone.norm3.bias"), r"1 missing, e\.g\. backbone\.norm3\.bias"),
    "one too many": (reshaped("block_3.0.extra.weight", 3), r"1 unknown, e\.g\. block_3\.0\.extra\.weight"),
    "another shape": (
        reshaped("block_1.semseg_0.op.x_proj_weight", 4, 12, 127),
        r"x_proj_weight: found shape \(4, 12, 127\)",
    ),
    "a scalar": (reshaped("concat_layers.semseg_2.weight"), r"concat_layers\.semseg_2\.weight: found shape \(\)"),
    "empty": (
        reshaped("final_project.depth.weight", 0, 16, 1, 1),
        r"final_project\.depth\.weight: found shape \(0, 16, 1, 1\)",
    ),
    "channels no task has": (
        reshaped("final_project.depth.weight", 2, 16, 1, 1),
        "head of 'depth' has 2 channels, expected 1",
    ),
    "odd widths": (reshaped("concat_layers.semseg_2.weight", 17, 34), "no network has these shapes|found shape"),
    "positions renumbered": (
        lambda state: state.update({INDEX: state[INDEX].flip(0)}),
        "positions are numbered in another way than Swin's",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_and_nothing_is_loaded(kind):
    damage, message = DAMAGE[kind]
    state = published(build(), "mtmamba")
    damage(state)
    with pytest.raises(OfficialError, match=message):
        load(state, image_size=(64, 128))


def test_other_tasks_and_arguments_are_told():
    state = published(build(), "mtmamba")
    foreign = {key.replace("depth", "albedo"): value for key, value in state.items()}
    with pytest.raises(OfficialError, match="the task 'albedo'"):
        load(foreign, image_size=(64, 128))
    with pytest.raises(OfficialError, match="extras: found A_log0, but"):
        load(state, image_size=(64, 128), extras={"A_log0": torch.zeros(1)})
    told = load(state, image_size=(64, 128), scan="s", num_heads=3).load_report.notices
    assert any("num_heads, scan: given and not used" in notice for notice in told)
    with pytest.raises(OfficialError, match=r"at 60×128 pixels: .*multiples of 32"):
        load(state, image_size=(60, 128))


def test_the_size_is_optional_and_no_tensor_depends_on_it():
    state = published(build(), "mtmamba")
    model = load(state)
    assert model.image_size == (512, 512) and any("512×512 taken" in n for n in model.load_report.notices)
    image = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        for task, logits in load(state, image_size=(64, 128))(image).items():
            assert torch.equal(model(image)[task], logits)


def test_the_configuration_of_the_published_decoder_is_the_default():
    assert MTMambaConfig() == get_recipe("nyud-mtmamba").model.decoder
