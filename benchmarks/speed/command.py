"""The command line of `pamm bench`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pamm.command_line import add_root, precision
from speed import BenchError
from speed.record import append, complete, table

Cases = Iterable[list[dict[str, Any]]]
"""Records, case by case, as they are measured."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Precision → its name in records, which is torch's."""


def main(arguments: list[str]) -> int:
    """Run `pamm bench ARGUMENTS`. Raises BenchError, ConfigError, DataError."""
    plain = arguments_parser().parse_args(arguments)
    for name, value in vars(plain).items():
        smallest = 0 if name in ("workers", "budget") else 1
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and number < smallest:
                raise BenchError(f"--{name.replace('_', '-')}: found {number}, expected a number from {smallest} up")
    if plain.bench == "report":
        from speed.report import write

        print(f"written: {', '.join(map(str, write(plain.results, plain.out)))}")
        return 0
    if plain.bench == "all":
        return run_plan(plain)
    done = [line for lines in MEASURE[plain.bench](plain) for line in finish(lines, plain.out)]
    return 1 if all(line["error"] for line in done) else 0


def run_plan(plain: argparse.Namespace) -> int:
    """The measurements of `plan.py`, or those of the kinds named; one that cannot be made is told and the others go on."""
    from speed.plan import PLAN

    for kind in plain.kinds:
        if kind not in MEASURE:
            raise BenchError(f"found '{kind}', expected kinds among {', '.join(MEASURE)}, or none for all")
    failed = 0
    more = ["--out", str(plain.out)]
    for line in PLAN:
        if plain.kinds and line[0] not in plain.kinds:
            continue
        print(f"pamm bench {' '.join(line)}", flush=True)
        threads = ["--threads", str(plain.threads)] if plain.threads and line[0] != "data" else []
        try:
            failed += main([*line, *more, *threads])
        except (ValueError, ImportError) as error:
            print(f"  not measured: {error}\n", flush=True)
            failed += 1
    return 1 if failed else 0


def arguments_parser() -> argparse.ArgumentParser:
    """Every subcommand with its options."""
    top = argparse.ArgumentParser(
        prog="pamm bench", description=(__doc__ or "") + " Speed and memory.", allow_abbrev=False
    )
    kinds = top.add_subparsers(
        dest="bench", required=True, metavar="scan | layers | model | train | data | scaling | all | report"
    )
    _scan_options(_kind(kinds, "scan", "the selective scan: engines, the published recurrence, mamba.py"))
    layers = _kind(kinds, "layers", "layers with C kernels of this package on a CPU, and torch's forms of them")
    layers.add_argument("layers", nargs="*", metavar="LAYER", help="convolution-l, experts-b, ... (default: all)")
    layers.add_argument(
        "--what",
        choices=["forward", "backward"],
        default="forward",
        help="backward: forward and backward, of layers that can be trained",
    )
    _model_options(_kind(kinds, "model", "a prediction: this package's network and its plain form"))
    train = _kind(kinds, "train", "a training step: forward, losses, backward, optimizer")
    _network_options(train)
    train.add_argument("--grad-checkpointing", action="store_true", help="also with train.grad_checkpointing")
    data = _kind(kinds, "data", "the training loader's throughput", timed=False)
    data.add_argument("recipe", help="a recipe's name: its data set is read")
    add_root(data)
    data.add_argument("--batch", type=int, help="images per batch (default: the recipe's)")
    data.add_argument("--images", type=int, default=64, help="synthetic data: number of images")
    data.add_argument("--batches", type=int, default=16, help="batches timed, after the first")
    data.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="loading processes, each tried")
    scaling = _kind(kinds, "scaling", "cost against tokens, tasks, experts and state size")
    scaling.add_argument("recipe", nargs="?", default="pascal-pamm-b")
    scaling.add_argument(
        "--axis", choices=["tokens", "tasks", "experts", "state"], action="append", help="default: all"
    )
    scaling.add_argument(
        "--backbone", action="store_true", help="along tokens, the backbone as well (its attention is quadratic)"
    )
    every = kinds.add_parser("all", help="every measurement of benchmarks/, one after the other", allow_abbrev=False)
    every.add_argument("kinds", nargs="*", metavar="KIND", help="only these kinds: scan, model, ...")
    every.add_argument("--out", type=Path, required=True, help="JSON lines are appended to this file")
    every.add_argument("--threads", type=int)
    report = kinds.add_parser("report", help="draw results as a page", allow_abbrev=False)
    report.add_argument("results", type=Path, nargs="+", help="files of JSON lines")
    report.add_argument("--out", type=Path, required=True, help="folder for README.md and its plots")
    return top


def _kind(kinds: Any, name: str, text: str, *, timed: bool = True) -> argparse.ArgumentParser:
    own = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
    own.add_argument("--out", type=Path, help="append the results to this file as JSON lines")
    if timed:
        own.add_argument("--precision", "--dtype", type=precision, choices=list(DTYPES), default="fp32")
        own.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
        kept = "keep: on a CPU, freed memory stays with the process, as in this package's training; for every candidate"
        own.add_argument("--allocator", choices=["system", "keep"], default="keep", help=kept)
        own.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
        own.add_argument("--rounds", type=int, default=5, help="turns of every candidate")
        own.add_argument(
            "--budget", type=float, default=30.0, help="seconds of timed calls per candidate; one call at least"
        )
        own.add_argument(
            "--no-memory", action="store_true", help="leave out the peak memory (one more process per candidate)"
        )
    return own


def _scan_options(own: argparse.ArgumentParser) -> None:
    own.add_argument("shapes", nargs="*", metavar="SHAPE", help="nyud-b, pascal-b, pascal-l, or D,N,H,W,orders")
    own.add_argument("--batch", type=int, default=1)
    own.add_argument("--per-order", action="store_true", help="every order has parameters of its own (MTMamba)")
    own.add_argument(
        "--what", choices=["forward", "backward"], action="append", help="backward: forward and backward; default: both"
    )
    own.add_argument("--engine", action="append", default=[], help="also this engine by name (see pamm doctor)")
    own.add_argument(
        "--plain",
        nargs="*",
        choices=["recurrence", "mambapy", "none"],
        help="default: recurrence, and mambapy where installed",
    )


def _model_options(own: argparse.ArgumentParser) -> None:
    _network_options(own)
    part = "decoder: decoder, heads and the resizing of their logits"
    own.add_argument("--part", choices=["whole", "decoder"], default="whole", help=part)
    dead = "plain released form: with the branch whose output is thrown away"
    own.add_argument("--dead-branch", action="store_true", help=dead)
    own.add_argument("--compile", action="store_true", help="also torch.compile of this package's form")


def _network_options(own: argparse.ArgumentParser) -> None:
    own.add_argument("recipe", help="a name that `pamm recipes` lists")
    own.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels (default: the recipe's)")
    own.add_argument("--batch", type=int, default=1)
    own.add_argument(
        "--plain",
        nargs="+",
        choices=["engine", "recurrence", "none"],
        default=["engine"],
        help="what the plain form scans with",
    )


def _job(plain: argparse.Namespace, work: str, settings: dict[str, Any]) -> dict[str, Any]:
    device = plain.device
    if device != "cpu":
        import torch

        there = torch.cuda.is_available()
        device = "cuda" if there or device == "cuda" else "cpu"
        if device == "cuda" and not there:
            raise BenchError("--device cuda: torch finds no CUDA device here; `pamm doctor` lists the devices")
    common = {"dtype": DTYPES[plain.precision], "device": device, "allocator": plain.allocator}
    timing = {"rounds": plain.rounds, "budget": plain.budget, "threads": plain.threads}
    return {"work": work, "settings": common | settings, **timing}


def _scan(plain: argparse.Namespace) -> Cases:
    from pamm.ops.selective_scan import ENGINES
    from speed.run import measure

    for engine in plain.engine:
        if engine not in (*ENGINES, "reference"):
            raise BenchError(f"--engine: found '{engine}', expected one of {', '.join(ENGINES)}, reference")
    chosen = plain.plain
    if chosen is None:
        chosen = ["recurrence", *(["mambapy"] if importlib.util.find_spec("mambapy") else [])]
    names = ["pamm", *(f"pamm: {engine}" for engine in plain.engine), *(name for name in chosen if name != "none")]
    for shape in plain.shapes or ["nyud-b", "pascal-l"]:
        for what in plain.what or ["forward", "backward"]:
            settings = {
                "batch": plain.batch,
                "per_order": plain.per_order,
                "backward": what == "backward",
                "candidates": names,
            }
            job = _job(plain, "scan", settings | scan_shape(shape))
            yield measure(
                "scan", shape, "forward + backward" if what == "backward" else what, job, memory=not plain.no_memory
            )


def scan_shape(text: str) -> dict[str, int]:
    """A named shape, or channels, state size, height, width and orders. Raises BenchError."""
    from speed.scan import SHAPES

    keys = ("channels", "state", "height", "width", "orders")
    parts = text.split(",")
    if text in SHAPES:
        return SHAPES[text]
    if len(parts) != len(keys) or not all(part.isdigit() and int(part) for part in parts) or int(parts[-1]) > 8:
        raise BenchError(
            f"shape '{text}': expected one of {', '.join(SHAPES)}, or {','.join(keys)} as in 1536,16,28,36,4 (1 to 8 orders)"
        )
    return dict(zip(keys, map(int, parts), strict=True))


def _layers(plain: argparse.Namespace) -> Cases:
    from speed.layers import CASES, LEARNING
    from speed.run import measure

    for name in plain.layers:
        if name not in CASES:
            raise BenchError(f"found '{name}', expected layers among {', '.join(CASES)}, or none for all")
    backward = plain.what == "backward"
    every = [name for name in CASES if not backward or name.split("-")[0] in LEARNING]
    for name in plain.layers or every:
        settings = {"layer": name, "backward": backward, "candidates": ["pamm", "torch"]}
        what = "forward + backward" if backward else "forward"
        yield measure("layers", name, what, _job(plain, "layers", settings), memory=not plain.no_memory)


def _model(plain: argparse.Namespace) -> Cases:
    from speed.run import measure

    settings = _network(plain) | {"part": plain.part, "dead_branch": plain.dead_branch}
    settings["candidates"][1:1] = ["pamm, compiled"] if plain.compile else []
    what = "prediction" if plain.part == "whole" else "decoder and heads"
    yield measure("model", plain.recipe, what, _job(plain, "model", settings), memory=not plain.no_memory)


def _train(plain: argparse.Namespace) -> Cases:
    from speed.run import measure

    settings = _network(plain)
    settings["candidates"][1:1] = ["pamm, recomputed"] if plain.grad_checkpointing else []
    what = "training step" + (f" at {plain.size[0]}×{plain.size[1]}" if plain.size else "")
    yield measure("train", plain.recipe, what, _job(plain, "train", settings), memory=not plain.no_memory)


def _network(plain: argparse.Namespace) -> dict[str, Any]:
    """Settings of a network's measurement. Raises ConfigError for an unknown recipe."""
    from pamm.config.recipes import get_recipe

    get_recipe(plain.recipe)
    names = ["pamm", *(f"plain, {scan}" for scan in plain.plain if scan != "none")]
    return {"recipe": plain.recipe, "size": plain.size, "batch": plain.batch, "candidates": names}


def _scaling(plain: argparse.Namespace) -> Cases:
    from pamm.config.experiment import PAMMConfig
    from pamm.config.recipes import get_recipe
    from speed.run import measure
    from speed.scaling import AXES

    if not isinstance(get_recipe(plain.recipe).model.decoder, PAMMConfig):
        raise BenchError(
            f"scaling varies PAMM's own quantities, which '{plain.recipe}' does not have; give pascal-pamm-b or another"
        )
    for axis in plain.axis or AXES:
        for value in AXES[axis]:
            names = ["decoder and heads", *(["backbone"] if plain.backbone and axis == "tokens" else [])]
            job = _job(plain, "scaling", {"recipe": plain.recipe, "axis": axis, "value": value, "candidates": names})
            yield measure(
                "scaling", f"{value} {axis}", axis, job | {"inline_memory": not plain.no_memory}, memory=False
            )


def _data(plain: argparse.Namespace) -> Cases:
    from dataclasses import replace

    from pamm.config.recipes import get_recipe
    from speed.data import throughput

    experiment = get_recipe(plain.recipe)
    changes = {"root": plain.root} if plain.root else {}
    changes |= {"images": (plain.images, 1)} if experiment.data.name == "synthetic" else {}
    train = replace(experiment.train, batch=plain.batch or experiment.train.batch)
    experiment = replace(experiment, data=replace(experiment.data, **changes), train=train)
    shape = {
        "recipe": plain.recipe,
        "batch": train.batch,
        "size": list(experiment.data.size),
        "tasks": list(experiment.tasks),
    }
    for workers in plain.workers:
        found = throughput(experiment, plain.batches, workers)
        told = {
            "bench": "data",
            "case": plain.recipe,
            "what": "training batch",
            "candidate": f"{workers} workers",
            "device": "cpu",
        }
        measured = {"seconds": found["seconds"], "images_per_second": found["images_per_second"]}
        yield [
            complete(told | measured | {"shape": shape | {"workers": workers, "first_batch_seconds": found["first"]}})
        ]


MEASURE = {"scan": _scan, "layers": _layers, "model": _model, "train": _train, "data": _data, "scaling": _scaling}


def finish(lines: list[dict[str, Any]], out: Path | None) -> list[dict[str, Any]]:
    """Print a case's table and append its lines, with the machine they were measured on."""
    from speed.machine import describe

    machine = describe()
    for line in lines:
        line["machine"] = machine
        line["threads"] = line["threads"] or os.cpu_count()
    if out:
        append(out, lines)
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"
    print(f"{table(lines)}\n  {where}, torch {machine['torch']}, commit {machine['commit']}\n", flush=True)
    return lines
