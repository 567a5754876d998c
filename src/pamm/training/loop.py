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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from pamm import PammError
from pamm.config.experiment import Experiment
from pamm.data import Batch
from pamm.evaluation.evaluate import Evaluation, evaluate_split
from pamm.models.formats import WEIGHTS_FILE
from pamm.models.model import INTERMEDIATE, LOSS, MultiTaskModel
from pamm.models.saved import load_weights
from pamm.runtime.workers import exhausted
from pamm.tasks import Task
from pamm.training.checkpoint import holds_files, save_checkpoint
from pamm.training.lock import FolderLock
from pamm.training.log import Log
from pamm.training.optimizer import set_learning_rate
from pamm.training.signals import StopSignals, exit_with

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule


UNMEASURED = "no task of weight above 0 has a label in the validation split"
"""The message if no evaluation can be compared with another."""


class TrainingError(PammError, RuntimeError):
    """A run that cannot go on; the message names the step, the cause and the remedy."""


def step_seed(seed: int, step: int) -> int:
    """Seed of the network's random draws at a step; the same on every process."""
    return (seed * 1_000_003 + step) % 2**63


def tell(fabric: Fabric, text: str) -> None:
    """A line on the standard error, from one of the processes."""
    if fabric.is_global_zero:
        tqdm.write(f"pamm: {text}", file=sys.stderr)


def joint_counts(
    fabric: Fabric, tasks: Mapping[str, Task], parts: list[Batch], asked: Sequence[bool] = ()
) -> tuple[dict[str, Tensor], list[bool]]:
    """The loss counts of every task over all parts and processes, and for each of `asked` whether any process has it."""
    counts = [torch.stack([task.counts(p.labels[name]) for p in parts]).sum(0) for name, task in tasks.items()]
    flat = torch.cat([*counts, torch.tensor([int(a) for a in asked], device=counts[0].device, dtype=counts[0].dtype)])
    flat = fabric.all_reduce(flat, reduce_op="sum")
    assert isinstance(flat, Tensor)
    pieces = flat.split([len(c) for c in counts] + [len(asked)])
    return dict(zip(tasks, pieces[:-1], strict=True)), (pieces[-1] > 0).tolist()


class Loop:
    """One run: steps, evaluations, checkpoints, log lines."""

    def __init__(
        self,
        fabric: Fabric,
        experiment: Experiment,
        out: Path,
        network: MultiTaskModel,
        model: _FabricModule,
        optimizer: Any,
        tasks: Mapping[str, Task],
        state: dict[str, Any],
        *,
        progress: bool = False,
        lock: FolderLock | None = None,
    ):
        self.fabric, self.experiment, self.config, self.out = fabric, experiment, experiment.train, out
        self.network, self.model, self.optimizer, self.tasks, self.state = network, model, optimizer, tasks, state
        self.weights = torch.tensor([task.weight for task in tasks.values()], device=fabric.device)
        self.lock = lock
        self.signals = StopSignals(self._nothing_unsaved, self._stop, speaks=fabric.is_global_zero)
        self.evaluating = False
        self.saved, self.saved_at = state["step"], time.monotonic()
        self.reported = state["step"], time.perf_counter()
        self.log = Log(out, state["step"], state["evaluated"]) if fabric.is_global_zero else None
        self.bar = tqdm(
            total=experiment.train.steps,
            initial=state["step"],
            desc=experiment.name,
            unit="step",
            disable=not (progress and fabric.is_global_zero),
            mininterval=0.2 if sys.stderr.isatty() else 20.0,
        )

    def run(self, loader: Iterable[list[Batch]]) -> Evaluation:
        """All remaining steps, then the evaluation of the best weights."""
        try:
            try:
                with self.signals:
                    return self._run(loader)
            finally:
                self.close()
        except Exception as error:
            told = exhausted(error)
            if told is None:
                raise
            raise TrainingError(f"{told}. {self._kept()}") from error

    def _run(self, loader: Iterable[list[Batch]]) -> Evaluation:
        self.saved_at = time.monotonic()
        self.model.train()
        if self._due(self.state["step"]):  # killed between saving and evaluating
            self.validate()
            self.save()
        for parts in loader:
            self._one_step(parts)
        return self._finish()

    def close(self) -> None:
        """Close the log and the progress bar, and release the run folder."""
        self.bar.close()
        if self.log:
            self.log.close()
        if self.lock:
            self.lock.release()

    def _nothing_unsaved(self) -> bool:
        """Whether this process may end at once: not between steps that others share with it."""
        return self.saved == self.state["step"] and (self.fabric.world_size == 1 or self.evaluating)

    def _stop(self, number: int) -> None:
        """End by a signal; the message names the last checkpoint."""
        where = f"stopped after step {self.state['step']} of {self.config.steps}. {self._kept()}"
        exit_with(number, where if self.fabric.is_global_zero else "")

    def _kept(self) -> str:
        """The last checkpoint and how to go on, in words."""
        if not holds_files(self.out / "last"):
            return "Nothing is saved yet: run the same command again to start anew"
        return f"{self.out / 'last'} holds step {self.saved}: run the same command again to go on from there"

    def _due(self, step: int) -> bool:
        """Whether the weights of this step still have to be evaluated."""
        every = self.config.eval_every
        regular = every > 0 and step > 0 and step % every == 0
        return (regular or step == self.config.steps) and self.state["evaluated"] < step

    def _one_step(self, parts: list[Batch]) -> None:
        config = self.config
        lr = set_learning_rate(self.optimizer, config, self.state["step"])
        losses, (term, interrupt, late) = self.update(parts)
        self.state["step"] = step = self.state["step"] + 1
        self.bar.update()
        if step % config.log_every == 0 or step == config.steps:
            self._report(step, losses, lr)
        stop = term or interrupt
        if stop or late or step % config.save_every == 0 or self._due(step):
            self.save()
        if stop:
            self._stop(signal.SIGTERM if term else signal.SIGINT)
        if self._due(step):
            self.validate()
            self.save()

    def _asked(self) -> list[bool]:
        """Requests of this process to all: stop by SIGTERM, stop by SIGINT, save because the last checkpoint is old."""
        limit = 60 * self.config.save_minutes
        late = self.fabric.is_global_zero and 0 < limit <= time.monotonic() - self.saved_at
        return [self.signals.told == signal.SIGTERM, self.signals.told == signal.SIGINT, late]

    def update(self, parts: list[Batch]) -> tuple[Tensor, list[bool]]:
        """One optimizer step on the parts of this process's share; returns the joined batch's losses (T,), NaN without a label.

        With "log_sum" they are means over the parts that have labels.
        """
        fabric, config = self.fabric, self.config
        torch.manual_seed(step_seed(config.seed, self.state["step"]))
        parts = [part.to(fabric.device) for part in parts]
        counts, asked = joint_counts(fabric, self.tasks, parts, self._asked())
        if config.scheme == "log_sum":  # the logarithm needs each part's loss whole
            per_part = [joint_counts(fabric, self.tasks, [part])[0] for part in parts]
        else:
            per_part = [counts] * len(parts)
        losses, labelled_parts = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.optimizer.zero_grad(set_to_none=True)
        for index, (part, part_counts) in enumerate(zip(parts, per_part, strict=True)):
            with fabric.no_backward_sync(self.model, enabled=index < len(parts) - 1):
                outputs = self.model(part.image, part.label_size)
                further = [INTERMEDIATE + n for n in self.tasks if INTERMEDIATE + n in outputs]
                pairs = [(name, name.removeprefix(INTERMEDIATE)) for name in (*self.tasks, *further)]
                local = torch.stack(
                    [self.tasks[n].loss(outputs[name], part.labels[n], part_counts[n]).float() for name, n in pairs]
                )
                joined = fabric.all_reduce(local.detach().clone(), reduce_op="sum")
                assert isinstance(joined, Tensor)
                labelled = torch.stack([part_counts[n][0] > 0 for _, n in pairs])
                total = self.total(local, joined, labelled, len(parts))
                own = sum(x for name, x in outputs.items() if name.startswith(LOSS))  # the same on every process
                fabric.backward(total * fabric.world_size + own / len(parts))
            losses += joined[: len(losses)]
            labelled_parts += labelled[: len(losses)]
        norm = fabric.clip_gradients(
            self.model, self.optimizer, max_norm=config.clip or math.inf, error_if_nonfinite=False
        )
        assert norm is not None  # there is one of clipping by the norm
        self._check(losses, norm)
        self.optimizer.step()
        known = losses.masked_fill(labelled_parts == 0, math.nan)
        return known if config.scheme == "sum" else known / labelled_parts, asked

    def total(self, local: Tensor, joined: Tensor, labelled: Tensor, parts: int) -> Tensor:
        """This process's part of the total loss. Its sum over processes has the gradient of the joined batch's total.

        local (K,): this process's sums over the joint counts; joined (K,): their totals over processes. The first are of the
        tasks, in order; further ones of the tasks with intermediate logits.
        """
        weights = self.weights if len(local) == len(self.weights) else self.weights.repeat(2)
        if self.config.scheme == "sum":
            return (weights * local).sum()
        return (weights * local / (joined + 1e-8) * labelled).sum() / parts  # ∇ Σ w·log(L + 1e-8)

    def _report(self, step: int, losses: Tensor, lr: float) -> None:
        """The progress line and a line of the log; images/s since the last one, evaluation and saving left out."""
        values = dict(zip(self.tasks, losses.tolist(), strict=True))
        now = time.perf_counter()
        rate = self.config.batch * (step - self.reported[0]) / (now - self.reported[1])
        self.reported = step, now
        shown = ", ".join(f"{name} {'–' if math.isnan(value) else f'{value:.3f}'}" for name, value in values.items())
        self.bar.set_postfix_str(f"{rate:.1f} images/s, lr {lr:.1e}, {shown}", refresh=False)
        if self.log:
            numbers = {"lr": lr, "images_per_second": rate, **{f"loss/{name}": v for name, v in values.items()}}
            self.log.write(step, "train", numbers)

    def _check(self, losses: Tensor, norm: Tensor) -> None:
        """Raises TrainingError, before the weights are touched, for a loss or gradient that is not finite."""
        if bool(losses.isfinite().all() & norm.isfinite()):
            return
        bad = [name for name, value in zip(self.tasks, losses.tolist(), strict=True) if not math.isfinite(value)]
        what = f"the loss of {', '.join(bad)}" if bad else "the gradient"
        raise TrainingError(f"{what} is not finite at step {self.state['step'] + 1}. {self._diverged()}")

    def _diverged(self) -> str:
        kept = f"{self.out / 'last'} holds step {self.saved}. " if holds_files(self.out / "last") else ""
        return f"{kept}Start again with a lower --train.lr, a --train.clip, or --precision fp32"

    def validate(self) -> Evaluation:
        """Evaluate on the validation split; keep the weights in best/ if the total validation loss is the lowest so far.

        Raises TrainingError where the network's output is not finite.
        """
        result = self._evaluate(quick=True)
        total = result.total_loss(self.tasks)
        step = self.state["step"]
        if any(values["loss"] == math.inf for values in result.row.values()):
            raise TrainingError(f"the validation loss is not finite after step {step}. {self._diverged()}")
        if self.log:
            flat = {f"{task}/{key}": value for task, metrics in result.row.items() for key, value in metrics.items()}
            self.log.write(step, "val", {"loss": total, **flat})
        measured = math.isfinite(total)
        if not measured:
            tell(self.fabric, f"{UNMEASURED}: best/ now holds the weights of step {step}, the latest")
        if not measured or total < self.state["best"] or not self.state["best_step"]:
            if self.fabric.is_global_zero:
                save_checkpoint(self.out / "best", self.network)
            self.state |= {"best": total, "best_step": step}
        self.state["evaluated"] = step
        self.reported = step, time.perf_counter()
        return result

    def _evaluate(self, *, quick: bool) -> Evaluation:
        options = {"quick": quick, "progress": not self.bar.disable and sys.stderr.isatty()}
        self.evaluating = True
        try:
            return evaluate_split(self.fabric, self.network, self.experiment, self.tasks, **options)
        finally:
            self.evaluating = False

    def save(self) -> None:
        """Write last/ (process 0)."""
        if self.log:
            self.log.flush()  # TensorBoard holds all that a resumed run does not write again
        if self.fabric.is_global_zero:
            save_checkpoint(self.out / "last", self.network, {**self.state, "optimizer": self.optimizer.state_dict()})
        self.fabric.barrier()
        self.saved, self.saved_at = self.state["step"], time.monotonic()
        self.reported = self.saved, time.perf_counter()

    def _finish(self) -> Evaluation:
        """The evaluation of best/, the weights that `load_model` takes from the run folder."""
        load_weights(self.network, self.out / "best" / WEIGHTS_FILE)
        result = self._evaluate(quick=False)
        model = {"source": str(self.out), "weights": "best", "step": self.state["best_step"]}
        result = dataclasses.replace(result, model=model)
        if self.fabric.is_global_zero:
            result.save(self.out / "results.json")
        self.fabric.barrier()
        return result
