"""Published PAMM checkpoints: their own outputs, maps and gradients; every key accounted for; bad files told."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import golden
import pamm
from pamm import official
from pamm.build import create_model
from pamm.cli import main
from pamm.config.experiment import ExpertsConfig, ModelConfig, ReleasedConfig
from pamm.config.strict import ConfigError
from pamm.models.registry import build_model
from pamm.models.saved import load_model
from pamm.nn.serialize import scan_orders
from pamm.official import OfficialError
from pamm.official.pamm import table
from pamm.tasks import create_task
from tiny import BACKBONE

CASES = ("pamm_released_pascal", "pamm_released_nyud", "pamm_released_pascal_z")
SIZE = (48, 64)
STAGE = "backbone.stage_MTLoRA_mamba.0"


def load_case(case: golden.GoldenCase, state: object, **changes: object) -> pamm.MultiTaskModel:
    arguments = {"image_size": case.image_size, "num_heads": case.facts["num_heads"], "scan": case.facts["scan"]}
    return official.load(state, **(arguments | {"extras": case.extras} | changes)).eval()


class Trained:
    """The loaded model of a case after a backward pass, with what it computed."""

    def __init__(self, name: str, *, accelerated: bool):
        self.case = golden.GoldenCase(name)
        self.model = load_case(self.case, self.case.state)
        if accelerated:
            pamm.accelerate(self.model, training=True)
        for key in self.case.extras:
            self.model.get_buffer(self.model.load_report.keys[key]).requires_grad_()
        with official.intermediates(self.model) as maps:
            self.outputs = self.model(self.case.image())
        self.maps = {name if name.startswith("order/") else f"mid/{name}": value for name, value in maps.items()}
        self.case.loss(self.outputs).backward()
        self.gradients = official.gradients(self.model)


@pytest.fixture(
    scope="module", params=[(name, how) for name in CASES for how in ("plain", "accelerated")], ids="-".join
)
def trained(request) -> Trained:
    name, how = request.param
    return Trained(name, accelerated=how == "accelerated")


def test_golden_outputs(trained):
    assert list(trained.outputs) == trained.case.tasks
    for task, value in trained.outputs.items():
        assert trained.case.deviation(f"output/{task}", value) <= 1e-5, task


def test_golden_maps_and_orders(trained):
    assert trained.maps.keys() == set(trained.case.maps("mid/", "order/"))
    for name, value in trained.maps.items():
        assert trained.case.deviation(name, value) <= 1e-5, name


@pytest.mark.parametrize("name", CASES)
def test_golden_outputs_and_maps_without_gradients(name, form):
    """As users predict: with experts and heads folded, where the form is not the plain one."""
    case = golden.GoldenCase(name)
    model = form(load_case(case, case.state))
    with torch.inference_mode(), official.intermediates(model) as maps:
        found = {f"output/{task}": value for task, value in model(case.image()).items()}
    found |= {f"mid/{name}": value for name, value in maps.items()}
    for name in case.maps("mid/", "output/"):
        assert case.deviation(name, found[name]) <= 1e-5, name


def test_golden_gradient_norms(trained):
    facts = trained.case.facts
    norms = facts["grad_norm"]
    assert set(norms) <= set(trained.gradients)
    largest = max(norm for norm in norms.values() if norm is not None)
    for key, norm in norms.items():
        gradient = trained.gradients[key]
        if norm is None:
            assert gradient is None, key
        else:
            assert float(gradient.norm()) == pytest.approx(norm, rel=1e-3, abs=1e-8 * largest), key
            assert list(gradient.shape) == (facts["state"].get(key) or facts["unregistered"][key])


def test_golden_report_accounts_for_every_key(trained):
    report = trained.model.load_report
    assert set(report.used) | set(report.ignored) == trained.case.state.keys() | trained.case.extras.keys()
    assert all(".conv2d0." in key for key in report.ignored) and report.missed == {}
    assert {place.own for place in report.used.values()} == trained.model.state_dict().keys()


def test_golden_from_files_and_wrappers(tmp_path):
    case = golden.GoldenCase("pamm_released_nyud")
    expected = load_case(case, case.state).state_dict()
    prefixed = {f"module.{key}": value for key, value in case.state.items()}
    whole = {"optimizer": {"step": 3}, "scheduler": {}, "model": prefixed, "epoch": 5, "iter_count": 40_000}
    torch.save(whole, tmp_path / "checkpoint.pth.tar40000")
    save_file({key: value.contiguous() for key, value in case.state.items()}, tmp_path / "weights.safetensors")
    sources = (
        whole,
        {"state_dict": case.state},
        tmp_path / "checkpoint.pth.tar40000",
        str(tmp_path / "weights.safetensors"),
    )
    for source in sources:
        model = load_case(case, source, extras={f"module.{key}": value for key, value in case.extras.items()})
        assert list(model.tasks) == case.tasks
        loaded = model.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.items())


# -- a small network under the published names, which needs no reference files ---------------------------------------------


def small(mlp_ratio: float | None = None, **changes: object) -> pamm.MultiTaskModel:
    """A network with random weights, constants included."""
    torch.manual_seed(0)
    settings = {"width": 32, "state_size": 4, "kernel_size": 3, "experts": ExpertsConfig(count=10, top_k=9, rank=2)}
    backbone = replace(BACKBONE, class_token=False, mlp_ratio=mlp_ratio)
    tasks = {"semseg": create_task("semseg", classes=["a", "b", "c"]), "depth": create_task("depth")}
    model = build_model(ModelConfig(backbone, ReleasedConfig(**(settings | changes))), tasks, SIZE).eval()
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith((".A_log", ".D", ".prior", ".running_mean")):
                value.add_(torch.randn_like(value) * 0.1)
    return model


def published(model: pamm.MultiTaskModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Its tensors under the published names, with a dead branch as in published checkpoints; the constants apart."""
    own, names = model.state_dict(), table(model.state_dict(), list(model.tasks))
    state = {}
    for key, place in names.items():
        value = place.view(own[place.own]).clone()
        if key.endswith("convsp.weight"):
            value = value.reshape(1, -1)
        state[key] = torch.cat([torch.ones_like(value[:, :1]), value], 1) if place.skip else value
    constants = {key: state.pop(key) for key in list(state) if re.search(r"\.(A_log0|D0|task_prompt_[BC])\.", key)}
    return state | {f"{STAGE}.conv2d0.MoE.0.W.weight": torch.ones(2, 32, 3, 3)}, constants


def load(state: object, **options: object) -> pamm.MultiTaskModel:
    return official.load(state, **({"image_size": SIZE, "num_heads": 2} | options))


def run(model: pamm.MultiTaskModel, size: tuple[int, int] = SIZE) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * size[0] * size[1]).view(1, 3, *size))


def test_names_are_one_to_one_and_both_ways():
    for changes in ({}, {"task_conv": False}, {"experts": ExpertsConfig(B=False, count=10, rank=2)}):
        model = small(**changes)
        own, names = model.state_dict(), table(model.state_dict(), list(model.tasks))
        places = [(place.own, place.row) for place in names.values()]
        assert len(set(places)) == len(places) and {name for name, _ in places} == own.keys()
        rows = {name: sorted(row for other, row in places if other == name) for name, row in places if row is not None}
        assert all(found == list(range(len(own[name]))) for name, found in rows.items())
        state, constants = published(model)
        loaded = load(state, extras=constants).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in own.items())


def test_the_gradient_of_two_equal_images_is_that_of_one():
    """In eval mode and with the mean as the loss; torch alone gets a single image's gradient wrong."""
    model = small()
    image = torch.linspace(-1, 1, 3 * SIZE[0] * SIZE[1]).sin().view(1, 3, *SIZE)
    found = []
    for images in (1, 2):
        model.zero_grad()
        sum(logits.square().mean() for logits in model(image.expand(images, -1, -1, -1)).values()).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    largest = max(float(gradient.norm()) for gradient in found[0].values())
    for name, gradient in found[0].items():
        assert float((gradient - found[1][name]).norm()) <= 1e-3 * float(gradient.norm()) + 1e-6 * largest, name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_bias": False, "expand": 1, "delta_rank": 5, "state_size": 7},
        {"task_conv": False, "mlp_ratio": 2.5},
        {"experts": ExpertsConfig(count=4, top_k=4, rank=3), "kernel_size": 5},
        {"experts": ExpertsConfig(B=False, count=10, top_k=9, rank=2)},
        {"experts": ExpertsConfig(B=False, C=False), "projection_bias": True},
        {"scan": "morton"},
    ],
)
def test_the_architecture_is_told_from_keys_and_shapes(changes):
    model = small(**changes)
    state, constants = published(model)
    loaded = load(state, extras=constants, scan=changes.get("scan", "hilbert"))
    for task, value in run(model).items():
        assert torch.equal(run(loaded)[task], value)
    switched = not loaded.settings["model"]["decoder"]["task_conv"] or "project" in " ".join(loaded.state_dict())
    assert ("no published outputs to compare" in str(loaded.load_report)) == switched


def test_the_model_saves_loads_predicts_and_is_the_users_own(tmp_path):
    state, constants = published(small())
    before = {key: value.clone() for key, value in state.items()}
    model = load(state, extras=constants)
    assert not model.training
    model.save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.image_size == SIZE and all(torch.equal(run(loaded)[t], v) for t, v in run(model).items())
    maps = pamm.Predictor(loaded, device="cpu")(np.random.default_rng(0).integers(0, 256, (50, 81, 3), np.uint8))
    assert maps["semseg"].shape == maps["depth"].shape == (50, 81)
    torch.nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in model.parameters())), model.parameters())
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_constants_that_are_not_given_take_their_values():
    state, constants = published(small())
    given = {key: value for key, value in constants.items() if key.endswith("D0.depth")}
    model = load(state, extras=given)
    stage = model.decoder.stages[0]
    torch.testing.assert_close(torch.exp(stage.A_log), torch.arange(1.0, 5.0).expand(2, 64, 4))
    assert torch.equal(stage.D[0], torch.ones(64)) and torch.equal(stage.D[1], given[f"{STAGE}.D0.depth"])
    assert not stage.B.prior.any() and not stage.C.prior.any()
    assert set(model.load_report.missed) == constants.keys() - given.keys()
    assert "14 missed" in str(model.load_report) and "A = −(1..N)" in str(model.load_report)


def test_a_pruned_or_extended_checkpoint_is_refused_with_examples():
    state, constants = published(small())
    for key in list(state)[::31]:
        if ".conv2d0." not in key:
            with pytest.raises(OfficialError, match=r"missing|unknown|holds no task|no published system"):
                load({name: value for name, value in state.items() if name != key})
    with pytest.raises(OfficialError, match=r"1 unknown, e\.g\. backbone\.extra"):
        load(state | {"backbone.extra": torch.ones(1)})
    with pytest.raises(OfficialError, match=r"backbone\.norm\.weight: found shape \(31,\), expected \(32,\)"):
        load(state | {"backbone.norm.weight": torch.ones(31)})
    with pytest.raises(OfficialError, match=r"extras: 'backbone\.norm\.weight' is none of the constants"):
        load(state, extras={"backbone.norm.weight": torch.ones(32)})
    with pytest.raises(OfficialError, match=rf"{STAGE}\.D0\.depth: found shape \(3,\)"):
        load(state, extras=constants | {f"{STAGE}.D0.depth": torch.ones(3)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (50, 64)}, r"found 50×64, expected multiples of the patch, 8"),
        ({"image_size": None}, r"48 positions, which are no square; give image_size"),
        ({"checkpoint_size": (64, 64)}, r"checkpoint_size: 8×8 tokens, but the checkpoint has 48"),
        ({"num_heads": 5}, r"num_heads: found 5, expected a divisor of the width, 32"),
        ({"scan": "peano"}, r"scan: found 'peano', expected one of hilbert, snake, morton, or h, s, z"),
    ],
)
def test_arguments_that_do_not_fit_are_told(options, message):
    with pytest.raises(OfficialError, match=message):
        load(published(small())[0], **options)


def test_another_size_is_resized_and_said(caplog):
    state, constants = published(small())
    own = load(state, extras=constants)
    assert not caplog.records and "resized" not in str(own.load_report)
    with caplog.at_level(logging.WARNING, logger="pamm.official.pamm"):
        model = load(state, extras=constants, image_size=(96, 128))
    assert "resized from 6×8 to 12×16 tokens" in caplog.text and "resized from 6×8" in str(model.load_report)
    assert model.image_size == (96, 128)
    assert model.decoder.stages[0].B.routers["depth"].positions.shape == (12, 16)
    for task, value in run(own, (96, 128)).items():  # as the network of the checkpoint's size does by itself
        torch.testing.assert_close(run(model, (96, 128))[task], value)
    turned = load(state, image_size=(128, 96), checkpoint_size=SIZE)
    assert "resized from 6×8 to 16×12" in str(turned.load_report) and "taken as" not in str(turned.load_report)
    assert "48 positions taken as 8×6" in str(load(state, image_size=(128, 96)).load_report)


def test_the_real_checkpoints_manifest():
    """A model of the recipe has the checkpoint's tensors, all of them but the dead branch and a class token's position."""
    manifest = golden.manifest("pamm_released_pascal_vitl")
    state = {key: torch.empty(shape, device="meta") for key, shape in manifest["state"].items()}
    loaded = official.load(state)
    built = create_model("pascal-pamm-released-l", pretrained=False, device="meta")
    assert built.settings["model"]["decoder"] == loaded.settings["model"]["decoder"]
    assert built.image_size == loaded.image_size == (512, 512)
    shapes = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    assert shapes == {name: tuple(value.shape) for name, value in loaded.state_dict().items()}
    report = loaded.load_report
    assert report.used.keys() | report.ignored.keys() == state.keys()
    assert report.parameters == manifest["parameters"] == 1_059_687_734
    learned = {k for k in report.ignored if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    dead = sum(state[key].numel() for key in learned)
    class_token = state["backbone.pos_embed"].shape[-1]
    assert sum(p.numel() for p in built.parameters()) == manifest["parameters"] - dead - class_token == 996_459_958
    assert dead == 63_226_752


def test_a_recipe_for_nyud_builds():
    model = create_model("nyud-pamm-released-l", pretrained=False, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 632_884_125
    assert model.decoder.stages[0].B.routers["depth"].positions.shape == (28, 36)


def test_gradients_need_a_report_and_maps_a_decoder_that_hands_them_out():
    with pytest.raises(OfficialError, match=r"was not made by pamm\.official\.load"):
        official.gradients(small())
    paper = create_model("demo", pretrained=False, device="meta")
    with pytest.raises(OfficialError, match="PAMMDecoder has no intermediate"), official.intermediates(paper):
        pass


def test_intermediate_results_are_handed_out_inside_the_block_alone():
    model = small()
    with official.intermediates(model) as maps:
        run(model)
    assert set(maps) == {
        *(f"{name}.{s}.{task}" for name in ("B", "C", "stage") for s in (0, 1) for task in model.tasks),
        *(f"tokens.{s}" for s in (0, 1)),
        *(f"order/{k}" for k in range(4)),
    }
    seen = dict(maps)
    run(model, (96, 128))
    assert all(maps[name] is value for name, value in seen.items())


# -- the command ---------------------------------------------------------------------------------------------------------------


def test_import_then_predict_and_evaluate(tmp_path, capsys):
    torch.save({"model": published(small())[0]}, tmp_path / "checkpoint.pth.tar")
    command = ["import", str(tmp_path / "checkpoint.pth.tar"), "--num-heads", "2", "--out", str(tmp_path / "model")]
    assert main([*command, "--image-size", "48", "64"]) == 0
    told = capsys.readouterr().out
    assert "1 ignored" in told and "missed" in told and str(tmp_path / "model") in told
    generator = np.random.default_rng(0)
    for kind in ("images", "semseg", "depth"):
        (tmp_path / "mine/val" / kind).mkdir(parents=True)
    Image.fromarray(generator.integers(0, 256, (50, 60, 3), np.uint8)).save(tmp_path / "mine/val/images/a.jpg")
    Image.fromarray(generator.integers(0, 3, (50, 60), np.uint8)).save(tmp_path / "mine/val/semseg/a.png")
    Image.fromarray(np.full((50, 60), 900, np.uint16)).save(tmp_path / "mine/val/depth/a.png")
    described = "tasks:\n  semseg: {classes: [sky, sea, land]}\n  depth: {unit: millimetre}\n"
    (tmp_path / "mine/dataset.yaml").write_text(described)
    out = tmp_path / "out"
    assert main(["predict", str(tmp_path / "model"), str(tmp_path / "mine/val/images"), "--out", str(out)]) == 0
    assert list(out.rglob("a.png"))
    (tmp_path / "mine.yaml").write_text(f"data: {{name: folder, root: {tmp_path}/mine, size: [48, 64], fit: true}}\n")
    arguments = ["eval", str(tmp_path / "model"), "--data", str(tmp_path / "mine.yaml"), "--device", "cpu"]
    assert main([*arguments, "--workers", "0"]) == 0, capsys.readouterr().err
    assert "mIoU" in capsys.readouterr().out


@pytest.mark.parametrize(("letter", "curve"), [("h", "hilbert"), ("s", "snake-released"), ("z", "morton-released")])
def test_import_takes_the_published_scan_letters(letter, curve, tmp_path, capsys):
    state, _ = published(small())
    torch.save({"model": state}, tmp_path / "checkpoint.pth.tar")
    arguments = ["--image-size", "48", "64", "--num-heads", "2", "--scan", letter, "--out", str(tmp_path / "model")]
    assert main(["import", str(tmp_path / "checkpoint.pth.tar"), *arguments]) == 0, capsys.readouterr()
    loaded = load_model(tmp_path / "model")
    with official.intermediates(loaded) as maps:
        outputs = run(loaded)
    assert torch.equal(torch.stack([maps[f"order/{k}"] for k in range(4)]), scan_orders(curve, 6, 8))
    direct = load(state, scan=letter)
    assert all(torch.equal(value, outputs[task]) for task, value in run(direct).items())


def test_import_says_what_is_wrong_and_replaces_nothing(tmp_path, capsys):
    (tmp_path / "checkpoint.pth").write_bytes(b"nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("kept")
    assert main(["import", str(tmp_path / "checkpoint.pth"), "--out", str(tmp_path / "model")]) == 1
    assert "is damaged" in capsys.readouterr().err and not (tmp_path / "model").exists()
    assert main(["import", str(tmp_path / "checkpoint.pth"), "--out", str(tmp_path / "full")]) == 1
    assert "exists already" in capsys.readouterr().err and (tmp_path / "full/mine.txt").exists()


def test_the_package_offers_it():
    assert (
        pamm.official is official
        and issubclass(OfficialError, ValueError)
        and not issubclass(OfficialError, ConfigError)
    )
