"""Benchmarks: plain forms compute what this package's networks compute; results are whole; failures are told, not fatal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from pamm import PammError
from pamm.cli import main as pamm
from pamm.config.experiment import ExpertsConfig, ModelConfig, ReleasedConfig, check
from pamm.config.recipes import get_recipe
from pamm.models.registry import build_model
from pamm.nn.serialize import scan_orders
from pamm.ops import selective_scan
from pamm.tasks import TASKS, create_task
from speed import BenchError, child, run
from speed.command import main, scan_shape
from speed.layers import CASES, LEARNING, workload
from speed.machine import scan_floor, vector_rates
from speed.measure import Candidate, Workload, in_turn
from speed.operations import operations
from speed.plain_pamm import PlainPAMM, plain_state
from speed.plain_released import PlainReleased
from speed.plain_scan import SCANS, Parts, along_orders, mambapy, recurrence
from speed.plan import PLAN
from speed.record import FIELDS, append, complete
from speed.scaling import AXES, varied
from speed.train import random_label
from tiny import BACKBONE, DECODER, MODEL

SIZE = (48, 64)
RELEASED = ReleasedConfig(width=32, state_size=4, experts=ExpertsConfig(count=11, top_k=9, rank=2), kernel_size=3)
NAMES = ("semseg", "depth", "normals")


def build(config: ModelConfig):
    torch.manual_seed(0)
    model = build_model(config, {name: create_task(name) for name in NAMES}, SIZE).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def assert_close(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    """Within 1e-4 of the largest value, as for published outputs."""
    assert ours.keys() == plain.keys()
    for name, value in ours.items():
        assert (value - plain[name]).abs().max() <= 1e-4 * value.abs().max(), name


def scan_parts(per_order: bool) -> tuple[Parts, torch.Tensor]:
    """Channel-major float32 inputs of 2 images, 5 channels, a 3×4 map, state size 3, two orders."""
    torch.manual_seed(0)
    orders = scan_orders("hilbert", 3, 4, 2)
    own = (2,) if per_order else ()
    x, delta = torch.randn(2, 5, 12), torch.randn(2, *own, 5, 12)
    B, C = (torch.randn(2, *own, 3, 12) for _ in range(2))
    A, D, bias = -torch.rand(*own, 5, 3) - 0.1, torch.randn(*own, 5), torch.randn(*own, 5)
    return Parts(*(values.requires_grad_() for values in (x, delta, A, B, C, D, bias))), orders


@pytest.mark.parametrize("per_order", [False, True], ids=["shared", "per order"])
@pytest.mark.parametrize("one", [recurrence, mambapy])
def test_plain_scans_equal_the_definition(one, per_order):
    if one is mambapy:
        pytest.importorskip("mambapy", reason="the library mambapy is not installed (extra bench)")
    parts, orders = scan_parts(per_order)
    x, delta, A, B, C, D, bias = parts
    tokens = (values.transpose(-1, -2)[None] for values in (x, delta, B, C))
    u, d, b, c = tokens
    expected = selective_scan(u, d, A[None], b, c, D[None], orders, delta_bias=bias[None], engine="reference")[
        0
    ].transpose(1, 2)
    y = along_orders(one, parts, orders)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad((y * weight).sum(), parts),
        torch.autograd.grad((expected * weight).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dead_branch", [False, True])
@pytest.mark.parametrize("scan", SCANS)
def test_the_plain_released_form_computes_the_same_outputs(scan, dead_branch):
    model = build(ModelConfig(replace(BACKBONE, class_token=False), RELEASED))
    for stage in model.decoder.stages:
        stage.B.prior.normal_()
        stage.C.prior.normal_()
    with torch.no_grad():
        stages = model.backbone(torch.randn(2, 3, *SIZE))
        plain = PlainReleased(model, SCANS[scan], dead_branch=dead_branch)
        assert_close(model.decode(stages, SIZE), plain(stages, SIZE))


def plain_twin(model, scan: str = "recurrence") -> PlainPAMM:
    return PlainPAMM(model, DECODER, SCANS[scan])


@pytest.mark.parametrize("training", [False, True])
def test_the_plain_form_of_pamm_computes_the_same_outputs_and_gradients(training):
    model = build(MODEL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".noise." in name:  # the two forms draw their noise in another order
                parameter.zero_()
    model.train(training)
    plain = plain_twin(model)
    stages = [stage.detach() for stage in model.backbone(torch.randn(2, 3, *SIZE))]
    ours, theirs = model.decode(stages, SIZE), plain(stages, SIZE)
    assert_close(ours, theirs)
    weights = {name: torch.randn_like(value) for name, value in ours.items()}
    for outputs in (ours, theirs):
        sum((value * weights[name]).mean() for name, value in outputs.items()).backward()
    zero = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    expected = plain_state(zero, list(NAMES))
    found = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None and ".noise." not in name}
    assert len(found) > 100
    largest = max(value.abs().max() for value in expected.values())
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max() + 1e-6 * largest, name


def test_the_plain_form_of_a_variant_is_refused():
    model = build(replace(MODEL, decoder=replace(DECODER, prior_B=False)))
    with pytest.raises(BenchError, match="every switch on"):
        PlainPAMM(model, replace(DECODER, prior_B=False), SCANS["engine"])


@pytest.mark.slow
def test_scan_writes_whole_json_lines(tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    arguments = ["bench", "scan", "8,4,3,5,2", "--rounds", "1", "--budget", "0.1", "--threads", "1", "--out", out]
    for more in (
        ("--what", "forward", "--plain", "recurrence"),
        ("--what", "backward", "--plain", "recurrence", "--engine", "step", "--no-memory"),
    ):
        assert pamm([str(argument) for argument in (*arguments, *more)]) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["what"], line["candidate"]) for line in lines] == [
        ("forward", "pamm"),
        ("forward", "recurrence"),
        *(("forward + backward", name) for name in ("pamm", "pamm: step", "recurrence")),
    ]
    for line in lines:
        assert tuple(line) == FIELDS and line["error"] is None
        assert line["shape"] | {"channels": 8, "state": 4, "height": 3, "width": 5, "orders": 2} == line["shape"]
        seconds = line["seconds"]
        assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"] and seconds["calls"] >= 1
        assert line["state_steps_per_second"] == pytest.approx(8 * 4 * 15 * 2 / seconds["median"])
        assert (line["difference"] is None) == (line["candidate"] == "pamm")
        assert line["difference"] is None or line["difference"] < 1e-4
        assert (line["dtype"], line["device"], line["threads"], line["allocator"]) == ("float32", "cpu", 1, "keep")
        assert line["machine"]["cores"] >= 1 and line["machine"]["torch"] == torch.__version__
        assert line["candidate"] in printed
    assert lines[0]["ratio"] == 1
    for memory in (line["memory"] for line in lines[:2]):
        assert memory["peak"] >= memory["before"] > 0 and memory["working"] == memory["peak"] - memory["before"]


@pytest.mark.slow
def test_a_network_is_measured_beside_its_plain_form(tmp_path):
    out = tmp_path / "results.jsonl"
    measuring = ["--size", "48", "64", "--rounds", "1", "--budget", "0.1", "--threads", "1", "--no-memory"]
    assert main(["model", "demo", "--part", "decoder", *measuring, "--out", str(out)]) == 0
    assert main(["train", "demo", "--grad-checkpointing", *measuring, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    trained = ["pamm", "pamm, recomputed", "plain, engine"]
    assert [line["candidate"] for line in lines] == ["pamm", "plain, engine", *trained]
    assert {line["what"] for line in lines[2:]} == {"training step at 48×64"}
    assert lines[3]["flops"] > 1.1 * lines[2]["flops"]  # the forward pass again
    assert all(line["error"] is None and line["images_per_second"] > 0 for line in lines)
    assert all(line["flops"] > 0 and line["gemm_share"] > 0 for line in lines)
    assert lines[1]["difference"] < 1e-4
    assert lines[0]["shape"]["size"] == [48, 64] and "depth" in lines[0]["shape"]["tasks"]


@pytest.mark.parametrize("case", CASES)
def test_layers_compute_what_torchs_forms_do(case, monkeypatch):
    """At a small size, forward and, where the kernel has a backward pass, backward too."""
    small = {"heads": 2, "tokens": 30, "channels": 144, "outputs": 128, "height": 9, "width": 8}
    small |= {"tasks": 2, "rows": 40, "inputs": 33}
    monkeypatch.setitem(CASES, case, {key: small[key] for key in CASES[case]})
    settings = {"layer": case, "device": "cpu", "dtype": "float32"}
    for backward in (False, True) if case.split("-")[0] in LEARNING else (False,):
        found = in_turn(workload(settings | {"backward": backward}), rounds=1, budget=0.1, device="cpu")
        assert found["pamm"].error is None and found["torch"].error is None
        assert found["torch"].difference < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers", "product-x"], "found 'product-x', expected layers among convolution-b"),
        (["layers", "product-b", "--dtype", "bf16"], "on the CPU in float32"),
        (["layers", "experts-b", "--what", "backward"], "no backward pass; measure --what forward"),
        (["scan", "64,4"], "shape '64,4': expected one of nyud-b"),
        (["scan", "8,4,3,5,9"], "1 to 8 orders"),
        (["scan", "nyud-b", "--engine", "fast"], "--engine: found 'fast', expected one of native"),
        (["scan", "nyud-b", "--rounds", "0"], "--rounds: found 0, expected a number from 1 up"),
        (["model", "pascal-pam-b"], "unknown recipe 'pascal-pam-b'"),
        (["all", "speed", "--out", "results.jsonl"], "found 'speed', expected kinds among scan, layers, model"),
        (["scaling", "nyud-mtmamba"], "does not have; give pascal-pamm-b"),
        (["report", "nothing.jsonl", "--out", "page"], r"nothing.jsonl: No such file .*--out FILE"),
    ],
)
def test_bad_arguments_are_told(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as told:
        main(arguments)
    assert isinstance(told.value, PammError)


def test_a_candidate_that_fails_leaves_the_others_running():
    def fails():
        raise RuntimeError("not enough memory")

    calls = []
    work = Workload({"a": Candidate(lambda: calls.append(1)), "b": Candidate(fails), "c": Candidate(lambda: None)}, {})
    found = in_turn(work, rounds=2, budget=0.1, device="cpu")
    assert found["b"].error == "RuntimeError: not enough memory" and found["b"].summary() is None
    assert found["a"].error is None and len(found["a"].seconds) >= 2 and len(found["c"].seconds) >= 2
    assert len(calls) > len(found["a"].seconds)  # warm-up is not timed


def test_a_call_beyond_the_budget_is_its_only_one():
    import time

    found = in_turn(Workload({"slow": Candidate(lambda: time.sleep(0.05))}, {}), rounds=5, budget=0.01, device="cpu")
    assert found["slow"].cold and found["slow"].summary()["calls"] == 1


CRASH = """
import json, os, sys
job = json.loads(sys.stdin.read())
left = [name for name in job["settings"]["candidates"] if name not in job["skip"]]
for name in left:
    print(json.dumps({"begin": name}), flush=True)
    if name == "doomed":
        os.kill(os.getpid(), 9)
timing = {"seconds": {"median": 2.0, "q1": 1.0, "q3": 3.0, "calls": 2, "cold": False}}
timing |= {"flops": None, "difference": None, "error": None}
result = {"shape": {}, "images": None, "steps": None, "threads": 1, "candidates": dict.fromkeys(left, timing)}
print(json.dumps({"result": result}))
"""


def test_a_candidate_whose_process_is_killed_is_reported(tmp_path, monkeypatch):
    (tmp_path / "crash.py").write_text(CRASH)
    monkeypatch.setattr(run, "CHILD", (str(tmp_path / "crash.py"),))
    settings = {"candidates": ["a", "doomed", "c"], "dtype": "float32", "device": "cpu", "allocator": "keep"}
    lines = run.measure("scan", "case", "forward", {"settings": settings}, memory=False)
    assert [(line["candidate"], line["error"] is None) for line in lines] == [
        ("a", True),
        ("doomed", False),
        ("c", True),
    ]
    assert "signal 9" in lines[1]["error"] and lines[1]["seconds"] is None and lines[2]["ratio"] == 1


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to look for the process")
@pytest.mark.slow
def test_a_benchmark_that_is_ended_ends_the_process_of_its_case(tmp_path):
    told = tmp_path / "pid"
    sleeper = f"import os, pathlib, time; pathlib.Path({str(told)!r}).write_text(str(os.getpid())); time.sleep(600)"
    code = f"import sys; sys.path[:0] = {sys.path!r}; from speed import run; run.CHILD = ('-c', {sleeper!r}); run._child({{}})"
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not (told.exists() and told.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.terminate()
    assert parent.wait(timeout=60) == 143
    assert not Path("/proc", told.read_text()).exists()


@pytest.mark.slow
def test_an_allocation_beyond_the_free_memory_fails_in_its_own_process(monkeypatch):
    shape = {"channels": 1 << 13, "state": 1 << 13, "height": 64, "width": 64, "orders": 1}  # decays of 1.1 TB
    settings = shape | {"batch": 1, "per_order": False, "backward": False, "candidates": ["recurrence"]}
    common = {"dtype": "float32", "device": "cpu", "allocator": "system"}
    job = {"work": "scan", "settings": settings | common, "rounds": 1, "budget": 1.0, "threads": 1}
    (line,) = run.measure("scan", "large", "forward", job, memory=False)
    assert "memory" in line["error"] and line["seconds"] is None


@pytest.mark.parametrize("groups", [1, 4])
def test_operations_of_a_grouped_convolution_are_those_of_its_groups(groups):
    """Forward, and once more for each of the two gradients: 2 · outputs · weights of one output."""
    convolution = torch.nn.Conv2d(8, 12, 3, padding=1, groups=groups)
    with operations() as counter:
        convolution(torch.randn(2, 8, 5, 7, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 12 * 5 * 7) * (8 // groups * 9)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_operations_of_the_c_kernels_are_those_they_carry_out():
    x, weight, bias = torch.randn(2, 8, 5, 7), torch.randn(12, 8, 3, 3), torch.randn(12)
    tiles, pairs = 2 * 2 * 2, 8 * 12
    with operations() as counter:
        torch.ops.pamm.convolution_3x3(x.requires_grad_(), weight.requires_grad_(), bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 36 * tiles * pairs
    with operations() as counter:
        kernels = torch.randn(6, 4, 9, 9), [torch.randn(2, 4, 9, 9)], torch.randn(6, 2)
        torch.ops.pamm.mixed_convolution(torch.randn(9, 20, 4), *kernels)
    assert counter.get_total_flops() == 2 * 4 * 130 * (2 * 3) * (4 * 6)


def test_the_floor_counts_operations_and_shared_exponentials():
    rates = vector_rates(1)
    if rates is None:
        pytest.skip("no C compiler here: rates of the processor are not measured")
    assert all(rate > 1e8 for rate in rates.values())
    floor = scan_floor(1e9, 4, True, 0.0, "cpu", 1)
    expected = 3e9 / floor["rates"]["multiply_adds"] + 0.25e9 / floor["rates"]["exponentials"]
    assert floor["seconds"] == pytest.approx(expected)


@pytest.mark.parametrize("name", TASKS)
def test_random_labels_have_a_loss(name):
    task = create_task(name)
    label = random_label(task, 2, (8, 8), torch.Generator().manual_seed(0))
    logits = torch.randn(2, task.channels, 8, 8, requires_grad=True)
    task.loss(logits, label).backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("axis", AXES)
def test_scaling_changes_one_quantity(axis):
    experiment = varied(get_recipe("pascal-pamm-b"), axis, AXES[axis][-1])
    check(experiment)
    tokens = experiment.data.size[0] * experiment.data.size[1] // 256
    decoder = experiment.model.decoder
    found = {
        "tokens": tokens,
        "tasks": len(experiment.tasks),
        "experts": decoder.experts.count,
        "state": decoder.state_size,
    }
    assert found == {"tokens": 1024, "tasks": 5, "experts": 15, "state": 64} | {axis: AXES[axis][-1]}


def test_the_loader_is_measured(tmp_path, capsys):
    pytest.importorskip("embreex", reason="the renderer of synthetic rooms is not installed (extra demo)")
    assert (
        main(
            [
                "data",
                "demo",
                "--root",
                str(tmp_path),
                "--images",
                "2",
                "--batch",
                "2",
                "--batches",
                "2",
                "--workers",
                "0",
            ]
        )
        == 0
    )
    assert "images/s" in capsys.readouterr().out


MACHINE = {"cpu": "a & b", "capability": "AVX2", "matrix_units": False, "cores": 2, "memory": 8e9, "gpu": None}
MACHINE |= {"torch": "2.6", "commit": "abc", "date": "2026-01-01T00:00:00Z"}


def result(**changes: object) -> dict:
    common = {"dtype": "float32", "device": "cpu", "allocator": "keep", "threads": 2, "machine": MACHINE, "shape": {}}
    return complete(common | changes)


def around(median: float) -> dict:
    return {"median": median, "q1": median / 2, "q3": median * 2, "calls": 3, "cold": False}


def test_the_report_draws_the_newest_results(tmp_path):
    scan = {"bench": "scan", "case": "nyud-b", "what": "forward"}
    growth = {"bench": "scaling", "what": "tokens", "candidate": "decoder and heads"}
    lines = [
        result(**scan, candidate="pamm", seconds=around(0.5), ratio=1.0),
        result(**scan, candidate="recurrence", seconds=around(1.5), ratio=3.0),
        result(**scan, candidate="mambapy", error="ended by signal 9"),
        result(**growth, case="256 tokens", shape={"value": 256}, seconds=around(0.1)),
        result(**growth, case="1024 tokens", shape={"value": 1024}, seconds=around(0.4)),
        result(**scan, candidate="pamm", seconds=around(0.25), ratio=1.0),
    ]
    append(tmp_path / "results.jsonl", lines)
    assert main(["report", str(tmp_path / "results.jsonl"), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page/README.md").read_text()
    for told in ("| pamm | 250 ms |", "| recurrence | 1.5 s |", "ended by signal 9", "commit abc"):
        assert told in page
    assert "| pamm | 500 ms |" not in page
    for picture in ("scan.svg", "scaling_tokens.svg"):
        assert f"({picture})" in page
        ElementTree.parse(tmp_path / "page" / picture)


def test_the_plan_is_one_of_known_measurements():
    from speed.command import arguments_parser

    for line in PLAN:
        plain = arguments_parser().parse_args(line)
        for shape in getattr(plain, "shapes", []):
            scan_shape(shape)
        if hasattr(plain, "recipe"):
            get_recipe(plain.recipe)
    assert set(child.WORKS) | {"data"} == {line[0] for line in PLAN}
