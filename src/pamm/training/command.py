"""The command lines of `pamm demo` and `pamm train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pamm.command_line import check_writable, parse_experiment

if TYPE_CHECKING:
    from pamm.config.experiment import Experiment


def demo(arguments: list[str]) -> int:
    from pamm.training.demo import run_demo

    experiment, args = parse_experiment("demo", ["demo", *arguments])
    check_writable(args.out or Path("runs/demo"))
    run_demo(experiment, args.out or Path("runs/demo"), progress=not args.quiet, kernels=args.kernels)
    return 0


def train(arguments: list[str]) -> int:
    experiment, args = parse_experiment("train", arguments)
    from pamm.training.run import train as run

    out = args.out or run_folder(experiment)
    check_writable(out)
    result = run(experiment, out, progress=not args.quiet, kernels=args.kernels)
    from pamm.runtime.distributed import is_first_process

    if is_first_process():
        from pamm.build import create_tasks
        from pamm.drawing.table import score_table

        print(score_table([(experiment.name, result.row)], create_tasks(experiment)))
        print(f"{result.protocol}\nrun folder: {out}, weights: best (step {result.model['step']})")
    return 0


def run_folder(experiment: Experiment) -> Path:
    """Where a run is kept unless its user says: runs/RECIPE; one on somebody's own folder has that folder's name as well.

    Otherwise two folders would share a run.
    """
    own = experiment.data.root if experiment.data.name == "folder" else None
    folder = os.path.basename(os.path.realpath(os.path.expanduser(own))) if own else ""
    return Path("runs") / "-".join(filter(None, [experiment.name, folder]))
