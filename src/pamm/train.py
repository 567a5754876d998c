"""The training loop, on Lightning Fabric.

The state of a run is weights, optimizer and step. Sample order and augmentation are functions of the seed and the position
in the stream, and every random draw of the network starts from (seed, step), so that a killed run resumes to the same bits on a
CPU, and several processes compute what one computes on the joined batch.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from pamm.build import create_tasks
from pamm.checkpoint import load_training, recover, save_checkpoint
from pamm.data import Batch, open_dataset
from pamm.data.loader import train_loader
from pamm.data.transforms import TrainTransform
from pamm.evaluate import Evaluation, evaluate_split
from pamm.experiment import ConfigError, Experiment, TrainConfig, dump, load, to_dict
from pamm.log import Log
from pamm.memory import keep_memory
from pamm.models.model import MultiTaskModel
from pamm.models.registry import build_model
from pamm.tasks import Task

FREE_KEYS = ("workers", "save_every", "log_every", "eval_every", "accelerator", "devices", "nodes")
"""Leaves of TrainConfig that may change when a run resumes: they do not enter the result."""


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names the step, the cause and the remedy."""


def launch(config: TrainConfig) -> Fabric:
    """Start Fabric with the configured processes (as well under torchrun or SLURM)."""
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.nodes,
        strategy="ddp" if config.devices * config.nodes > 1 else "auto",
        precision=config.precision,
    )
    fabric.launch()
    if fabric.device.type == "cpu":
        keep_memory()
    return fabric


def train(experiment: Experiment, out: Path, *, progress: bool = True) -> Evaluation:
    """Train into the folder `out`, or go on where a run in it stopped; returns the final evaluation.

    Raises ConfigError, DataError, CheckpointError, TrainingError. A SIGTERM saves and exits with code 143.
    """
    loop, loader = create_loop(experiment, out)
    return loop.run(loader, progress=progress and loop.fabric.is_global_zero)


def create_loop(experiment: Experiment, out: Path) -> tuple[Loop, Iterable[list[Batch]]]:
    """Everything a run needs, at the step where it starts or goes on, and the batches of its remaining steps."""
    config = experiment.train
    fabric = launch(config)
    start_folder(fabric, experiment, out)
    tasks = create_tasks(experiment)
    data = open_dataset(experiment.data, "train", tasks)
    torch.manual_seed(config.seed)
    network = build_model(experiment.model, tasks, experiment.data.size)
    model, optimizer = fabric.setup(network, create_optimizer(network, config))
    state = {"step": 0, "best": math.inf, "best_step": -1}
    if (out / "last").exists():
        saved = load_training(out / "last", network)
        optimizer.load_state_dict(saved.pop("optimizer"))
        state = saved
    place = {"rank": fabric.global_rank, "world": fabric.world_size, "start_step": state["step"]}
    loader = train_loader(data, TrainTransform(tasks, experiment.data, config.seed), config, **place)
    return Loop(fabric, experiment, out, network, model, optimizer, tasks, state), loader


def start_folder(fabric: Fabric, experiment: Experiment, out: Path) -> None:
    """Create the run folder with its experiment.yaml, or check that the run in it is this one. Raises ConfigError."""
    path = out / "experiment.yaml"
    recover(out / "last")
    if path.exists() and (out / "last").exists():
        found, wanted = _flat(to_dict(load(path))), _flat(to_dict(experiment))
        free = {f"train.{key}" for key in FREE_KEYS}
        different = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
        different = [key for key in different if key not in free]
        if different:
            shown = "; ".join(f"{key}: {found.get(key)} there, {wanted.get(key)} here" for key in different[:4])
            raise ConfigError(
                f"{out} holds another experiment ({shown}). Choose another folder with --out, or remove this one"
            )
    fabric.barrier()
    if fabric.is_global_zero:
        out.mkdir(parents=True, exist_ok=True)
        dump(experiment, path)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW; no weight decay for norms, biases and parameters marked `_no_weight_decay` (A_log, D, priors)."""
    decay, exempt = [], []
    for name, parameter in model.named_parameters():
        free = parameter.ndim <= 1 or name.endswith("bias") or getattr(parameter, "_no_weight_decay", False)
        (exempt if free else decay).append(parameter)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return kind(groups, lr=config.lr)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Poly schedule lr·(1 − step/steps)^power, after a linear warm-up of `warmup` steps."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    return config.lr * warm * (1 - step / config.steps) ** config.power


def step_seed(seed: int, step: int) -> int:
    """Seed of the network's random draws at a step; the same on every process."""
    return (seed * 1_000_003 + step) % 2**63


def joint_counts(
    fabric: Fabric, tasks: Mapping[str, Task], parts: list[Batch], stop: bool
) -> tuple[dict[str, Tensor], bool]:
    """The loss counts of every task over all parts and processes, and whether any process was told to stop."""
    counts = [sum(task.counts(part.labels[name]) for part in parts) for name, task in tasks.items()]
    flat = torch.cat([*counts, torch.tensor([int(stop)], device=counts[0].device)])
    flat = fabric.all_reduce(flat, reduce_op="sum")
    pieces = flat.split([len(c) for c in counts] + [1])
    return dict(zip(tasks, pieces[:-1], strict=True)), bool(pieces[-1] > 0)


class Loop:
    """One run: steps, evaluations, checkpoints, log lines."""

    def __init__(
        self,
        fabric: Fabric,
        experiment: Experiment,
        out: Path,
        network: MultiTaskModel,
        model: nn.Module,
        optimizer: Any,
        tasks: Mapping[str, Task],
        state: dict[str, Any],
    ):
        self.fabric, self.experiment, self.config, self.out = fabric, experiment, experiment.train, out
        self.network, self.model, self.optimizer, self.tasks, self.state = network, model, optimizer, tasks, state
        self.weights = torch.tensor([task.weight for task in tasks.values()], device=fabric.device)
        self.told_to_stop = False
        self.reported = state["step"], time.perf_counter()
        self.log = Log(out, state["step"]) if fabric.is_global_zero else None

    def run(self, loader: Any, *, progress: bool) -> Evaluation:
        """All remaining steps, then the final evaluation."""
        previous = signal.signal(signal.SIGTERM, self._stop)
        interval = 0.2 if sys.stderr.isatty() else 20.0
        bar = tqdm(
            total=self.config.steps,
            initial=self.state["step"],
            desc=self.experiment.name,
            unit="step",
            disable=not progress,
            mininterval=interval,
        )
        try:
            self.model.train()
            for parts in loader:
                self._one_step(parts, bar)
            return self._finish()
        finally:
            bar.close()
            signal.signal(signal.SIGTERM, previous)
            if self.log:
                self.log.close()

    def _stop(self, *_: object) -> None:
        self.told_to_stop = True

    def _one_step(self, parts: list[Batch], bar: tqdm) -> None:
        step, config = self.state["step"], self.config
        lr = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses, stop = self.update(parts)
        self.state["step"] = step = step + 1
        bar.update()
        if step % config.log_every == 0 or step == config.steps:
            self._report(step, losses, lr, bar)
        evaluated = config.eval_every and step % config.eval_every == 0 and step < config.steps
        if evaluated:
            self.validate()
        if stop or step % config.save_every == 0 or step == config.steps or evaluated:
            self.save(losses)
        if stop and step < config.steps:
            raise SystemExit(143)

    def update(self, parts: list[Batch]) -> tuple[Tensor, bool]:
        """One optimizer step on the parts of this process's share; returns the joined batch's losses (T,)."""
        fabric, config = self.fabric, self.config
        torch.manual_seed(step_seed(config.seed, self.state["step"]))
        parts = [part.to(fabric.device) for part in parts]
        counts, stop = joint_counts(fabric, self.tasks, parts, self.told_to_stop)
        if config.scheme == "log_sum":  # the logarithm needs each part's loss whole
            per_part = [joint_counts(fabric, self.tasks, [part], False)[0] for part in parts]
        else:
            per_part = [counts] * len(parts)
        losses = torch.zeros_like(self.weights)
        self.optimizer.zero_grad(set_to_none=True)
        for index, (part, part_counts) in enumerate(zip(parts, per_part, strict=True)):
            with fabric.no_backward_sync(self.model, enabled=index < len(parts) - 1):
                logits = self.model(part.image, part.label_size)
                local = torch.stack(
                    [task.loss(logits[n], part.labels[n], part_counts[n]).float() for n, task in self.tasks.items()]
                )
                joined = fabric.all_reduce(local.detach().clone(), reduce_op="sum")
                labelled = torch.stack([part_counts[n][0] > 0 for n in self.tasks])
                fabric.backward(self.total(local, joined, labelled, len(parts)) * fabric.world_size)
            losses += joined if config.scheme == "sum" else joined / len(parts)
        if config.clip is not None:
            fabric.clip_gradients(self.model, self.optimizer, max_norm=config.clip, error_if_nonfinite=False)
        self.optimizer.step()
        return losses, stop

    def total(self, local: Tensor, joined: Tensor, labelled: Tensor, parts: int) -> Tensor:
        """This process's part of the total loss. Its sum over processes has the gradient of the joined batch's total.

        local (T,): this process's sums over the joint counts; joined (T,): their totals over processes.
        """
        if self.config.scheme == "sum":
            return (self.weights * local).sum()
        return (self.weights * local / (joined + 1e-8) * labelled).sum() / parts  # ∇ Σ w·log(L + 1e-8)

    def _report(self, step: int, losses: Tensor, lr: float, bar: tqdm) -> None:
        values = dict(zip(self.tasks, losses.tolist(), strict=True))
        self._check(values)
        now = time.perf_counter()
        rate = self.config.batch * (step - self.reported[0]) / (now - self.reported[1])
        self.reported = step, now
        bar.set_postfix_str(
            f"{rate:.1f} images/s, lr {lr:.1e}, " + ", ".join(f"{n} {v:.3f}" for n, v in values.items()), refresh=False
        )
        if self.log:
            self.log.write(
                step, "train", {"lr": lr, "images_per_second": rate, **{f"loss/{n}": v for n, v in values.items()}}
            )

    def _check(self, losses: dict[str, float]) -> None:
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"the loss of {', '.join(bad)} is not finite at step {self.state['step']}. The last good checkpoint is "
                f"{self.out / 'last'}; lower --train.lr, set --train.clip, or use --train.precision 32-true"
            )

    def validate(self) -> Evaluation:
        """Evaluate on the validation split; keep the weights in best/ if the total validation loss is the lowest so far."""
        result = evaluate_split(self.fabric, self.network, self.experiment, self.tasks)
        total = result.total_loss(self.tasks)
        if self.log:
            flat = {f"{task}/{key}": value for task, metrics in result.row.items() for key, value in metrics.items()}
            self.log.write(self.state["step"], "val", {"loss": total, **flat})
        if total < self.state["best"]:
            self.state |= {"best": total, "best_step": self.state["step"]}
            if self.fabric.is_global_zero:
                save_checkpoint(self.out / "best", self.network)
        return result

    def save(self, losses: Tensor) -> None:
        """Write last/ (process 0)."""
        self._check(dict(zip(self.tasks, losses.tolist(), strict=True)))
        if self.fabric.is_global_zero:
            save_checkpoint(self.out / "last", self.network, {**self.state, "optimizer": self.optimizer.state_dict()})
        self.fabric.barrier()

    def _finish(self) -> Evaluation:
        result = self.validate()
        if self.fabric.is_global_zero:
            result = dataclasses.replace(result, model={"source": str(self.out), "step": self.state["step"]})
            result.save(self.out / "results.json")
        self.fabric.barrier()
        return result
