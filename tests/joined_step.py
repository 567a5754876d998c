"""One optimizer step on one or two processes, for each loss scheme and with all labels or without some. Run by test_train.py.

Arguments: cache of the synthetic data, number of processes, output file; it takes
{"scheme-labels" or "system-labels": losses, gradients, weights}.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from pamm.data.sample import Batch
from pamm.tasks import Task
from pamm.training.run import create_loop
from tiny import PEERS, experiment

MISSING = {0: ("depth", "sal"), 1: ("depth",), 3: ("semseg", "sal")}
"""Image of the joined batch → labels taken from it: of two processes, the first has no depth at all."""


def take_labels(batch: Batch, tasks: Mapping[str, Task], first: int) -> None:
    """Make labels missing in a process's part, which begins with image `first` of the joined batch."""
    for row in range(len(batch.ids)):
        for name in MISSING.get(first + row, ()):
            batch.labels[name][row] = tasks[name].missing(batch.labels[name].shape[-2:])


def step(root: str, devices: int, scheme: str, labels: str, folder: Path, system: str | None = None) -> dict:
    settings = experiment(root, steps=1, batch=4, devices=devices, scheme=scheme)
    if system:
        data = replace(settings.data, size=(64, 64), images=(4, 1))
        settings = replace(settings, data=data, model=PEERS[system])
    loop, loader = create_loop(settings, folder)
    parts = next(iter(loader))
    if labels == "missing":
        take_labels(parts[0], loop.tasks, loop.fabric.global_rank * len(parts[0].ids))
    losses, _ = loop.update(parts)
    gradients = {name: p.grad for name, p in loop.network.named_parameters()}
    loop.fabric.barrier()
    loop.close()
    return {"losses": losses, "gradients": gradients, "weights": loop.network.state_dict()}


if __name__ == "__main__":
    root, devices, out = sys.argv[1:]
    found = {
        f"{scheme}-{labels}": step(root, int(devices), scheme, labels, Path(out).with_suffix("") / scheme / labels)
        for scheme in ("sum", "log_sum")
        for labels in ("complete", "missing")
    }
    for system in ("mlore", "invpt"):
        found[f"{system}-missing"] = step(
            root, int(devices), "sum", "missing", Path(out).with_suffix("") / system, system
        )
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(found, out)
