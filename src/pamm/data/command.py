"""The command line of `pamm data`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from pamm.command_line import add_root, parser
from pamm.files import shown


def main(arguments: list[str]) -> int:
    own = parser("data")
    own.add_argument(
        "source",
        metavar="FOLDER|RECIPE",
        help="a folder data set, a recipe's name or an experiment.yaml; of equal names the recipe's is meant, ./NAME the folder",
    )
    add_root(own)
    own.add_argument(
        "--deep", action="store_true", help="read every file; report the content of the labels and every error"
    )
    own.add_argument(
        "--val-fraction", type=float, help="as data.val_fraction: share of train that is the validation split"
    )
    args = own.parse_args(arguments)
    from pamm.build import check_options
    from pamm.config.experiment import Experiment, check
    from pamm.config.recipes import named_data
    from pamm.data import Dataset, dataset_class
    from pamm.data.inspect import format_inspection, inspect_dataset, reading_workers

    experiment = named_data(args.source, args.root)
    config, own_options = experiment.data, {name: task.options for name, task in experiment.tasks.items()}
    check_options(experiment)
    if args.val_fraction is not None:
        config = replace(config, val_fraction=args.val_fraction)
        check(Experiment(data=config))
    print(f"data set: {config.name}, {shown(config.root, 300) if config.root else 'made here, kept in the cache'}")
    kind = dataset_class(config)
    if kind.prepare is not Dataset.prepare:  # its images are made here
        for split in ("train", "val"):
            kind.open(config, split, {}).prepare(workers=os.cpu_count() or 1)
    how = {"deep": args.deep, "workers": reading_workers(), "progress": sys.stderr.isatty()}
    rows = inspect_dataset(config, options=own_options, **how)
    print(format_inspection(rows))
    return 1 if any(row.problems for row in rows) else 0
