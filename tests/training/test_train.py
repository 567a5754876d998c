"""Training: exact resumption, several processes as one, and a loop that learns."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pamm.build import create_tasks
from pamm.cli import main
from pamm.config.experiment import DataConfig, TaskConfig
from pamm.config.strict import ConfigError
from pamm.tasks import NonFiniteError
from pamm.training.loop import TrainingError, step_seed
from pamm.training.optimizer import create_optimizer
from pamm.training.run import create_loop, train
from runs import ENVIRONMENT, TESTS
from tiny import experiment


@pytest.fixture(scope="session")
def rooms(tmp_path_factory) -> str:
    """Cache of the synthetic data that the tests of this session share."""
    return str(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="module")
def stepped(rooms, tmp_path_factory) -> list[dict]:
    """What one process and what two processes computed in steps on the same batches."""
    results = []
    for devices in (1, 2):
        out = tmp_path_factory.mktemp("step") / "found.pt"
        done = subprocess.run(
            [sys.executable, str(TESTS / "joined_step.py"), rooms, str(devices), str(out)],
            capture_output=True,
            text=True,
            check=False,
            env=ENVIRONMENT,
        )
        assert done.returncode == 0, done.stderr
        results.append(torch.load(out, weights_only=True))
    return results


STEPS = [f"{scheme}-{labels}" for scheme in ("sum", "log_sum") for labels in ("complete", "missing")]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*STEPS, "mlore-missing", "invpt-missing"])
def test_two_processes_step_as_one_on_the_joined_batch(stepped, case):
    """For both schemes of the loss, and for systems whose networks add to it."""
    one, two = (result[case] for result in stepped)
    torch.testing.assert_close(one["losses"], two["losses"], rtol=1e-6, atol=1e-6)
    norm = torch.stack([g.norm() for g in one["gradients"].values()]).norm()
    for name, gradient in one["gradients"].items():
        assert (gradient - two["gradients"][name]).abs().max() <= 1e-6 * max(1.0, norm), name
    # Adam's first step is lr·sign(gradient): weights are compared where the gradient is more than rounding noise
    for name, gradient in one["gradients"].items():
        clear = gradient.abs() > 1e-5
        difference = (one["weights"][name] - two["weights"][name])[clear]
        assert not clear.any() or difference.abs().max() <= 1e-6, name
    for name in one["weights"]:
        if "running" in name:
            torch.testing.assert_close(one["weights"][name], two["weights"][name], rtol=1e-5, atol=1e-6)


def test_a_saved_run_is_measured_as_training_measured_it(rooms, tmp_path):
    settings = experiment(rooms, steps=2)
    train(settings, tmp_path / "run", progress=False)
    arguments = ("eval", tmp_path / "run", "--out", tmp_path / "r.json", "--device", "cpu", "--workers", 0)
    assert main([str(argument) for argument in arguments]) == 0
    measured = json.loads((tmp_path / "r.json").read_text())
    assert measured["images"] == 5
    trained = json.loads((tmp_path / "run/results.json").read_text())
    assert set(measured["results"]) == set(settings.tasks) and trained["results"] == measured["results"]
    assert set(measured["images_by_score"]) == set(settings.tasks)
    own = measured["original"]  # every room has the frame's size
    assert own["resized"] == 0
    for name, metrics in own["results"].items():
        assert metrics == {key: value for key, value in trained["results"][name].items() if key != "loss"}


@pytest.mark.slow
def test_training_lowers_every_loss(rooms, tmp_path):
    settings = experiment(rooms, steps=60, batch=8, warmup=5, lr=2e-3, optimizer="adamw")
    train(settings, tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [{k: v for k, v in line.items() if k.startswith("loss/")} for line in lines if line["kind"] == "train"]
    for name in settings.tasks:
        first = sum(entry[f"loss/{name}"] for entry in losses[:5]) / 5
        last = sum(entry[f"loss/{name}"] for entry in losses[-10:]) / 10
        assert last < 0.95 * first, f"{name}: {first} → {last}"
    assert (tmp_path / "best/model.safetensors").exists()
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_folder_with_another_experiment_is_refused(rooms, tmp_path):
    train(experiment(rooms, steps=1), tmp_path, progress=False)
    with pytest.raises(ConfigError, match=r"holds another experiment \(train\.lr: 0\.001 there, 0\.002 here\).*--out"):
        train(experiment(rooms, steps=1, lr=2e-3), tmp_path, progress=False)
    train(experiment(rooms, steps=1, log_every=5), tmp_path, progress=False)  # does not enter the result


def test_weight_decay_spares_state_space_parameters_and_priors(rooms, tmp_path):
    loop, _ = create_loop(experiment(rooms), tmp_path)
    names = {id(p): name for name, p in loop.network.named_parameters()}
    loop.close()
    decayed, exempt = (
        {names[id(p)] for p in g["params"]} for g in create_optimizer(loop.network, loop.config).param_groups
    )
    assert decayed | exempt == set(names.values()) and not decayed & exempt
    assert {name.split(".")[-1] for name in exempt} == {"A_log", "D", "delta_bias", "prior"}


def test_the_log_sum_gradient_is_that_of_the_sum_of_logarithms(rooms, tmp_path):
    settings = experiment(rooms)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, scheme="log_sum"))
    loop, _ = create_loop(settings, tmp_path)
    loop.close()
    losses = torch.rand(6, requires_grad=True)
    labelled = torch.tensor([True, True, False, True, True, True])
    ours = torch.autograd.grad(loop.total(losses, losses.detach(), labelled, 1), losses)[0]
    plain = torch.autograd.grad((loop.weights * torch.log(losses + 1e-8) * labelled).sum(), losses)[0]
    torch.testing.assert_close(ours, plain)


def test_the_best_weights_are_those_of_the_lowest_validation_loss(rooms, tmp_path):
    result = train(experiment(rooms, steps=6, eval_every=2, lr=0.05), tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "val"}
    assert sorted(losses) == [2, 4, 6]
    best = min(losses, key=losses.get)
    assert result.model["step"] == best
    assert result.total_loss(create_tasks(experiment(rooms))) == pytest.approx(losses[best], rel=1e-5)


def test_parts_of_a_batch_have_the_loss_of_the_whole(rooms, tmp_path):
    """Accumulation: the sum over the parts of losses over joint counts, as the logits of the parts give it."""
    settings = experiment(rooms, accumulate=2)
    loop, loader = create_loop(settings, tmp_path)
    parts = next(iter(loader))
    loop.model.train()
    torch.manual_seed(step_seed(settings.train.seed, 0))
    logits = [loop.network(part.image) for part in parts]
    expected = []
    for name, task in loop.tasks.items():
        joined = torch.cat([x[name] for x in logits]), torch.cat([part.labels[name] for part in parts])
        expected.append(task.loss(*joined))
    total = sum(weight * loss for weight, loss in zip(loop.weights, expected, strict=True))
    total.backward()
    plain = {name: p.grad.clone() for name, p in loop.network.named_parameters()}
    plain_norm = torch.stack([g.norm() for g in plain.values()]).norm()
    losses, _ = loop.update(parts)
    loop.close()
    torch.testing.assert_close(losses, torch.stack(expected).detach(), rtol=1e-5, atol=1e-6)
    clipped = min(1.0, settings.train.clip / (float(plain_norm) + 1e-6))
    for name, p in loop.network.named_parameters():
        torch.testing.assert_close(p.grad, plain[name] * clipped, rtol=1e-3, atol=1e-6 * float(plain_norm))


@pytest.fixture
def half_labelled(tmp_path) -> DataConfig:
    """A folder of two images of which one has no depth."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "semseg", "depth"):
            (tmp_path / "half" / split / kind).mkdir(parents=True)
        for index in range(2):
            place = tmp_path / "half" / split
            Image.fromarray(generator.integers(0, 256, (48, 64, 3), np.uint8)).save(place / f"images/{index}.png")
            Image.fromarray(generator.integers(0, 3, (48, 64), np.uint8)).save(place / f"semseg/{index}.png")
        Image.fromarray(np.full((48, 64), 2000, np.uint16)).save(place / "depth/0.png")
    (tmp_path / "half/dataset.yaml").write_text("tasks: {semseg: {classes: [a, b, c]}, depth: {}}")
    return DataConfig(name="folder", root=str(tmp_path / "half"), size=(48, 64))


@pytest.mark.parametrize(("scheme", "accumulate"), [("sum", 1), ("log_sum", 1), ("log_sum", 2)])
def test_a_batch_without_a_label_has_no_loss_of_that_task(half_labelled, tmp_path, capsys, scheme, accumulate):
    """Not one of 0: the log leaves it out, the bar shows a dash; with two parts, one of them unlabelled, it is the other's."""
    tasks = {"semseg": TaskConfig(), "depth": TaskConfig()}
    settings = experiment(steps=4, batch=accumulate, accumulate=accumulate, scheme=scheme, lr=1e-9)
    train(dataclasses.replace(settings, tasks=tasks, data=half_labelled), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    depths = [line["loss/depth"] for line in lines if "loss/depth" in line]
    assert len(depths) == (2 if accumulate == 1 else 4) and all("loss/semseg" in line for line in lines)
    assert min(depths) > 1  # some 2 metres; half of that if the part without depth counted as one of no loss
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert len(board.Scalars("train/loss/depth")) == len(depths)
    assert ("depth –" in capsys.readouterr().err) == ("loss/depth" not in lines[-1])


def test_bf16_trains(rooms, tmp_path):
    train(experiment(rooms, steps=2, precision="bf16-mixed"), tmp_path, progress=False)
    weights = load_file(tmp_path / "best/model.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}


def test_an_absent_device_is_told(rooms, tmp_path):
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ConfigError, match=rf"train.device = {absent}.*--device cpu"):
        train(experiment(rooms, device=absent), tmp_path, progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains(rooms, tmp_path):
    result = train(experiment(rooms, steps=2, device="cuda", precision="bf16-mixed"), tmp_path, progress=False)
    assert set(result.row) == set(experiment(rooms).tasks)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_remedy(rooms, tmp_path):
    with pytest.raises(TrainingError, match=r"not finite at step 2\..*--train\.lr"):
        train(experiment(rooms, steps=8, lr=1e30, clip=None), tmp_path, progress=False)


def test_a_network_that_diverges_on_the_validation_split_never_becomes_the_best(rooms, tmp_path):
    settings = dataclasses.replace(experiment(rooms, steps=1, lr=1e30, clip=None), tasks={"depth": TaskConfig()})
    with pytest.raises((TrainingError, NonFiniteError), match="not finite"):
        train(settings, tmp_path, progress=False)
    assert not (tmp_path / "best").exists()
