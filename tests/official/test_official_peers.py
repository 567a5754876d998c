"""Published checkpoints of MLoRE, InvPT and TaskPrompter: their outputs, maps and gradients, keys and facts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import golden
import pamm
from pamm import official
from pamm.cli import main
from pamm.config.recipes import get_recipe
from pamm.config.strict import to_dict
from pamm.models.mlore import imbalance
from pamm.models.registry import build_model
from pamm.models.saved import load_model
from pamm.official import SYSTEMS, OfficialError
from pamm.tasks import create_task
from tiny import PEERS

FACTS = {
    "mlore_pascal": ("num_heads", "topk", "pre_softmax"),
    "invpt_pascal": ("num_heads",),
    "taskprompter_pascal": ("chan_nheads",),
    "taskprompter_cityscapes": ("image_ratio", "chan_nheads"),
}
"""Golden case → the facts that neither keys nor shapes tell."""


def load_case(case: golden.GoldenCase, name: str, **changes: object) -> pamm.MultiTaskModel:
    facts = {fact: case.facts[fact] for fact in FACTS[name]}
    return official.load(case.state, **({"image_size": case.image_size, "facts": facts} | changes))


class Loaded:
    """The loaded model of a case after a backward pass, with what it computed."""

    def __init__(self, name: str, *, accelerated: bool):
        self.case = golden.GoldenCase(name)
        self.model = load_case(self.case, name)
        if accelerated:
            pamm.accelerate(self.model, training=True)
        with official.intermediates(self.model) as maps:
            size = tuple(self.case.facts.get("output", self.case.image_size))
            self.outputs = self.model(self.case.image(), size)
        self.maps = {f"mid/{name}": value for name, value in maps.items()}
        self.case.loss(self.outputs).backward()
        self.gradients = official.gradients(self.model)


@pytest.fixture(
    scope="module", params=[(name, how) for name in FACTS for how in ("plain", "accelerated")], ids="-".join
)
def loaded(request) -> Loaded:
    name, how = request.param
    return Loaded(name, accelerated=how == "accelerated")


def test_golden_outputs(loaded):
    assert list(loaded.outputs) == loaded.case.tasks
    for task, value in loaded.outputs.items():
        assert loaded.case.deviation(f"output/{task}", value) <= 1e-5, task


def test_golden_maps(loaded):
    assert loaded.maps.keys() == set(loaded.case.maps("mid/"))
    for name, value in loaded.maps.items():
        assert loaded.case.deviation(name, value) <= 1e-5, name


def test_golden_gradient_norms(loaded):
    """A norm of 0 and none are the same: the parameter has no effect."""
    norms = loaded.case.facts["grad_norm"]
    assert set(norms) <= set(loaded.gradients)
    largest = max(norm for norm in norms.values() if norm is not None)
    for key, norm in norms.items():
        gradient = loaded.gradients[key]
        found = 0.0 if gradient is None else float(gradient.norm())
        assert found == pytest.approx(norm or 0.0, rel=1e-3, abs=1e-8 * largest), key


def test_every_key_is_used_or_ignored_and_every_parameter_has_a_gradient(loaded):
    report = loaded.model.load_report
    assert set(report.used) | set(report.ignored) == loaded.case.state.keys() and not report.missed
    assert {place.own for place in report.used.values()} == loaded.model.state_dict().keys()
    assert all(parameter.grad is not None for parameter in loaded.model.parameters())


@pytest.mark.parametrize("name", FACTS)
def test_golden_outputs_without_gradients(name, form):
    case = golden.GoldenCase(name)
    model = form(load_case(case, name))
    with torch.inference_mode():
        found = model(case.image(), tuple(case.facts.get("output", case.image_size)))
    for task, value in found.items():
        assert case.deviation(f"output/{task}", value) <= 1e-5, task


def test_the_published_load_balancing(loaded):
    if "load_balancing" in loaded.case.facts:
        routes = [
            torch.stack([loaded.maps[f"mid/route{block}.{stage}.{task}"] for task in loaded.case.tasks])
            for block in (1, 2)
            for stage in range(4)
        ]
        total = sum(float(imbalance(route.detach())) for route in routes)
        assert total == pytest.approx(loaded.case.facts["load_balancing"], rel=1e-5)


# -- the real checkpoints' keys ----------------------------------------------------------------------------------------------

MANIFESTS = {
    "mlore_pascal_vitl": ("mlore", "pascal-mlore-l"),
    "mlore_pascal_vitb": ("mlore", "pascal-mlore-b"),
    "mlore_nyud_vitl": ("mlore", "nyud-mlore-l"),
    "invpt_pascal_vitl": ("invpt", "pascal-invpt-l"),
    "invpt_nyud_vitl": ("invpt", "nyud-invpt-l"),
    "taskprompter_pascal_vitl": ("taskprompter", "pascal-taskprompter-l"),
    "taskprompter_pascal_vitb": ("taskprompter", "pascal-taskprompter-b"),
    "taskprompter_nyud_vitl": ("taskprompter", "nyud-taskprompter-l"),
    "taskprompter_cityscapes_swinb": ("taskprompter-swin", "cityscapes-taskprompter"),
}
"""Manifest of a published checkpoint → its system here, and the recipe of its training."""


@pytest.mark.parametrize("name", MANIFESTS)
def test_real_checkpoints_are_known_by_their_sizes_alone(name):
    listed = golden.manifest(name)
    state = {key: torch.empty(shape, device="meta") for key, shape in listed["state"].items()}
    model = official.load(state)
    report, (system, recipe) = model.load_report, MANIFESTS[name]
    assert (report.system, report.parameters) == (system, listed["parameters"])
    assert report.used.keys() | report.ignored.keys() == state.keys()
    assert not report.missed and "whose facts are taken" in str(report)
    trained = get_recipe(recipe)
    assert model.image_size == trained.data.size and sorted(model.tasks) == sorted(trained.tasks)
    own, expected = model.settings["model"], to_dict(trained.model)
    for leaf in ("load_balancing", "further_prompts"):  # training alone; a task that is left out here
        own["decoder"].pop(leaf, None), expected["decoder"].pop(leaf, None)
    assert own["decoder"] == expected["decoder"]
    assert own["backbone"]["out_indices"] == expected["backbone"]["out_indices"]
    assert own["backbone"]["class_token"] == expected["backbone"]["class_token"]


# -- facts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "fact"), [(name, fact) for name, facts in FACTS.items() for fact in facts])
def test_a_needed_fact_that_is_missing_is_told_with_its_place(name, fact):
    case = golden.GoldenCase(name)
    facts = {key: case.facts[key] for key in FACTS[name] if key != fact}
    with pytest.raises(OfficialError, match=rf"^{fact} \(.*It is written in .*--facts {fact}=.*--published "):
        load_case(case, name, facts=facts)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mlore_pascal", {"topk": 16}, "topk: found 16, expected 1 to the number of experts, 15"),
        ("mlore_pascal", {"topk": "nine"}, "expected a whole number: experts kept"),
        ("mlore_pascal", {"ranks": [1, 2]}, "the checkpoint's shapes show"),
        ("mlore_pascal", {"chan_nheads": 1}, "found 'chan_nheads', mlore has num_heads, taps, topk"),
        ("invpt_pascal", {"num_heads": 5}, "num_heads: found 5, expected a divisor of the width, 32"),
        ("invpt_pascal", {"taps": [1, 2, 3]}, "expected 4 increasing numbers up to 4"),
        ("taskprompter_pascal", {"use_ctr": False}, "shapes show True"),
        ("taskprompter_cityscapes", {"chan_nheads": 4}, "chan_nheads"),
    ],
)
def test_a_wrong_fact_is_told(name, changes, message):
    case = golden.GoldenCase(name)
    facts = {key: case.facts[key] for key in FACTS[name]} | changes
    with pytest.raises(OfficialError, match=message):
        load_case(case, name, facts=facts)


def test_facts_that_the_shapes_tell_may_be_given_as_well():
    for name in FACTS:
        case = golden.GoldenCase(name)
        system = SYSTEMS["taskprompter-swin" if "cityscapes" in name else name.split("_")[0]]
        known = {key: case.facts[key] for key in system.FACTS if key in case.facts}
        assert len(known) > len(FACTS[name])
        load_case(case, name, facts=known)


def test_a_published_configuration_gives_its_facts():
    case = golden.GoldenCase("mlore_pascal")
    assert (
        load_case(case, "mlore_pascal", facts={"num_heads": 4}, published="nyud")
        .decoder.first[0]
        .routers["sal"]
        .renormalised
    )
    with pytest.raises(OfficialError, match=r"chan_nheads .*--published pascal or nyud"):  # PASCAL's two differ in it
        load_case(golden.GoldenCase("taskprompter_pascal"), "taskprompter_pascal", facts={}, published="pascal")
    with pytest.raises(OfficialError, match="found 'cityscapes', of mlore are known: pascal, nyud"):
        load_case(case, "mlore_pascal", published="cityscapes")
    with pytest.raises(OfficialError, match="found for a checkpoint of mlore, which has none"):
        load_case(case, "mlore_pascal", scan="snake")


def test_the_command_takes_facts(tmp_path, capsys):
    case = golden.GoldenCase("mlore_pascal")
    torch.save({"model": {f"module.{key}": value for key, value in case.state.items()}}, tmp_path / "c.pth")
    command = ["import", str(tmp_path / "c.pth"), "--image-size", "64", "96", "--out", str(tmp_path / "model")]
    assert main([*command, "--facts", "num_heads=4", "topk=9"]) == 1
    assert "--facts pre_softmax=…" in capsys.readouterr().err
    assert main([*command, "--facts", "num_heads"]) == 1
    assert "found 'num_heads', expected KEY=VALUE" in capsys.readouterr().err
    assert main([*command, "--facts", "num_heads=4", "topk=9", "pre_softmax=false"]) == 0
    assert "1927 tensors used, 0 ignored" in capsys.readouterr().out
    with torch.no_grad():
        outputs = load_model(tmp_path / "model")(case.image())
    assert all(case.deviation(f"output/{task}", value) <= 1e-5 for task, value in outputs.items())


# -- other sizes and keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTS)
def test_another_image_size_resizes_what_is_tied_to_the_grid(name):
    case = golden.GoldenCase(name)
    size = tuple(side // 2 if "cityscapes" in name else 2 * side for side in case.image_size)
    model = load_case(case, name, image_size=size, checkpoint_size=case.image_size)
    assert model.image_size == size and "resized from" in str(model.load_report)
    image = torch.nn.functional.interpolate(case.image(), size=size, mode="bilinear")
    with torch.no_grad():
        once, each_time = model(image), load_case(case, name)(image)
    for task, value in once.items():
        assert value.shape[-2:] == size and value.isfinite().all()
        if name in ("mlore_pascal", "invpt_pascal"):  # TaskPrompter multiplies two resized maps, or one
            assert (value - each_time[task]).abs().max() <= 1e-5 * value.abs().max(), task


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_damaged_checkpoint_is_told(name, change):
    case = golden.GoldenCase(name)
    key = next(key for key in case.state if key.endswith("blocks.1.norm1.weight"))
    if change == "unknown":
        case.state["backbone.more"] = torch.ones(2)
    elif change == "shape":
        case.state[key] = torch.ones(7)
    else:
        del case.state[key]
    with pytest.raises(
        OfficialError, match={"unknown": "1 unknown", "missing": "1 missing"}.get(change, "found shape")
    ):
        load_case(case, name)


def test_what_the_first_releases_built_and_never_ran_is_ignored():
    case = golden.GoldenCase("mlore_pascal")
    unused = {"backbone.q_fuse.sal.weight": (28, 112, 1, 1), "aux_heads.sal.linear_pred.bias": (2,)}
    unused |= {"backbone.classify_route_1.weight": (5, 14, 1, 1)}
    case.state |= {key: torch.ones(shape) for key, shape in unused.items()}
    assert set(load_case(case, "mlore_pascal").load_report.ignored) == unused.keys()


def test_the_prompt_of_detection_stays_and_the_rest_of_it_is_ignored():
    """The checkpoint of three tasks without its detection gives what the same network with the third prompt gives."""
    config = PEERS["taskprompter-swin"]
    config = replace(config, decoder=replace(config.decoder, further_prompts=1))
    tasks = {name: create_task(name) for name in ("semseg", "depth")}
    model = build_model(config, tasks, (128, 128)).eval()
    names = SYSTEMS["taskprompter-swin"].table(model.state_dict(), list(tasks))
    state = {key: model.state_dict()[place.own] for key, place in names.items()}
    extra = {"heads.3ddet.fpn.weight": torch.ones(3), "backbone.fea_fuse.0.3ddet.0.weight": torch.ones(3)}
    extra["backbone.layers.2.blocks.1.attn_mask"] = torch.ones(2, 4)
    loaded = official.load(state | extra, image_size=(128, 128), facts={"image_ratio": 0.75, "chan_nheads": 1})
    assert set(loaded.load_report.ignored) == extra.keys()
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        expected, found = model(image), loaded(image)
    assert all(torch.equal(found[task], value) for task, value in expected.items())
