"""One optimizer step on one or two processes; writes losses, gradients and weights. Run by test_train.py.

Arguments: cache of the synthetic data, number of processes, loss scheme, "complete" or "missing" labels, output file.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from pamm.data.sample import Batch
from pamm.tasks import Task
from pamm.training.run import create_loop
from tiny import experiment

MISSING = {0: ("depth", "sal"), 1: ("depth",), 3: ("semseg", "sal")}
"""Image of the joined batch → labels taken from it: of two processes, the first has no depth at all."""


def take_labels(batch: Batch, tasks: Mapping[str, Task], first: int) -> None:
    """Make labels missing in a process's part, which begins with image `first` of the joined batch."""
    for row in range(len(batch.ids)):
        for name in MISSING.get(first + row, ()):
            batch.labels[name][row] = tasks[name].missing(batch.labels[name].shape[-2:])


if __name__ == "__main__":
    root, devices, scheme, labels, out = sys.argv[1:]
    settings = experiment(root, steps=1, batch=4, devices=int(devices), scheme=scheme)
    loop, loader = create_loop(settings, Path(out).with_suffix(""))
    parts = next(iter(loader))
    if labels == "missing":
        take_labels(parts[0], loop.tasks, loop.fabric.global_rank * len(parts[0].ids))
    losses, _ = loop.update(parts)
    if loop.fabric.is_global_zero:
        gradients = {name: p.grad for name, p in loop.network.named_parameters()}
        torch.save({"losses": losses, "gradients": gradients, "weights": loop.network.state_dict()}, out)
    loop.fabric.barrier()
    loop.close()
