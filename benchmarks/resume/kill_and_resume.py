"""Kill a training run with SIGKILL at random moments, resume it each time, and compare its end with that of a run left alone.

    python benchmarks/resume/kill_and_resume.py --kills 100

A run is `pamm train` of a tiny network on twelve synthetic rooms, with a data loading process, checkpoints by the step and by the
clock, and an evaluation every fifth step. Every attempt is a process of its own, forked from one that has imported torch, and is
killed at a random moment after its start; a run that ends before the last kill is followed by another.

Compared, bit by bit: weights of last/ and best/, the optimizer's state, results, the log's lines (but for images per second) and
TensorBoard's scalars. Besides, nothing may be left over. Exit code 1 if anything differs. Runs on Linux and macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pamm.config.experiment import (
    BackboneConfig,
    DataConfig,
    Experiment,
    ExpertsConfig,
    ModelConfig,
    PAMMConfig,
    TaskConfig,
    TrainConfig,
)
from pamm.training.run import train


def tiny(root: Path, steps: int, workers: int) -> Experiment:
    """Three tasks on 48×64 rooms, stochastic depth and router noise included."""
    backbone = BackboneConfig(
        "vit_tiny_patch16_224", False, (0, 1), 0.2, patch_size=8, embed_dim=32, depth=2, num_heads=2
    )
    decoder = PAMMConfig(width=32, state_size=4, experts=ExpertsConfig(count=5, top_k=3, rank=2))
    return Experiment(
        name="tiny",
        tasks={"semseg": TaskConfig(), "depth": TaskConfig(), "normals": TaskConfig(2.0)},
        data=DataConfig(name="synthetic", root=str(root), size=(48, 64), images=(12, 3)),
        model=ModelConfig(backbone, decoder),
        train=TrainConfig(
            steps=steps,
            batch=2,
            lr=1e-3,
            save_every=7,
            save_minutes=0.002,
            eval_every=5,
            log_every=1,
            workers=workers,
            device="cpu",
        ),
    )


def start(experiment: Experiment, out: Path) -> int:
    """Train in a forked process; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        torch.set_num_threads(1)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            train(experiment, out, progress=False)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def step_of(out: Path) -> int:
    """The step that last/ holds."""
    path = next((p for p in (out / "last/training.pt", out / ".last.old/training.pt") if p.exists()), None)
    return torch.load(path, weights_only=True)["step"] if path else 0


def flat(value: object, name: str = "") -> dict[str, object]:
    """Nested dicts and lists → path → leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        return {name: value}
    return {path: leaf for key, part in items for path, leaf in flat(part, f"{name}/{key}").items()}


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not tag.endswith("images_per_second")]
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}


def lines(out: Path) -> list[dict[str, object]]:
    """The log without what depends on the clock."""
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in found]


def differences(whole: Path, killed: Path) -> list[str]:
    """Everything in which two finished runs differ."""
    found = []
    for part in ("last", "best"):
        one, two = (load_file(out / part / "model.safetensors") for out in (whole, killed))
        found += [f"{part}: {key}" for key in one.keys() | two.keys() if not torch.equal(one[key], two[key])]
    one, two = (flat(torch.load(out / "last/training.pt", weights_only=True)) for out in (whole, killed))
    for key in one.keys() | two.keys():
        a, b = one.get(key), two.get(key)
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        found += [] if same else [f"training.pt: {key}"]
    if lines(whole) != lines(killed):
        steps = [Counter((line["step"], line["kind"]) for line in lines(out)) for out in (whole, killed)]
        found.append(f"log.jsonl: {(steps[0] - steps[1]) or ''} missing, {(steps[1] - steps[0]) or ''} too many")
    found += [] if scalars(whole) == scalars(killed) else ["TensorBoard"]
    results = [json.loads((out / "results.json").read_text()) for out in (whole, killed)]
    for one in results:
        one["model"].pop("source")
    found += [] if results[0] == results[1] else ["results.json"]
    names = [sorted(path.name for path in out.iterdir()) for out in (whole, killed)]
    found += [] if names[0] == names[1] else [f"left over: {set(names[1]) ^ set(names[0])}"]
    return found


def main() -> int:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--kills", type=int, default=100)
    own.add_argument("--steps", type=int, default=600)
    own.add_argument("--workers", type=int, default=1)
    own.add_argument("--longest", type=float, default=5.0, help="seconds that an attempt lives at most")
    own.add_argument("--seed", type=int, default=0)
    plain = own.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that scalars were dropped, as they should be
    draw = random.Random(plain.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        experiment = tiny(folder / "rooms", plain.steps, plain.workers)
        assert os.waitpid(start(experiment, folder / "whole"), 0)[1] == 0, "the run left alone failed"
        kills, resumes, runs, steps, found, started = 0, 0, 1, [], [], time.perf_counter()
        while True:
            out = folder / f"killed-{runs}"
            resumes += out.exists()
            pid = start(experiment, out)
            if kills < plain.kills:
                time.sleep(draw.uniform(0.0, plain.longest))
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if os.WIFSIGNALED(status):
                kills += 1
                steps.append(step_of(out))
                continue
            if os.WEXITSTATUS(status):
                print(f"the attempt after kill {kills} failed after step {step_of(out)}")
                return 1
            found += [f"run {runs}: {text}" for text in differences(folder / "whole", out)]
            if kills >= plain.kills:
                break
            runs += 1  # it ended before it could be killed often enough: another one from the start
        print(
            f"{kills} kills, {resumes} resumes, {runs} runs of {plain.steps} steps in {time.perf_counter() - started:.0f} s; "
            f"checkpoints found after the kills: of {len(set(steps))} different steps, {min(steps)} to {max(steps)}"
        )
        print(
            "\n".join(found) or "the same bits: weights, optimizer, best, results, log, TensorBoard; nothing left over"
        )
        return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
