"""The command line of `pamm ablate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pamm.ablate.tables import TABLES, AblationRow, AblationTable, get_table
from pamm.command_line import add_tasks, parse_experiment
from pamm.config.strict import ConfigError

if TYPE_CHECKING:
    from pamm.ablate.result import RowResult
    from pamm.ablate.runs import Plan


def main(arguments: list[str]) -> int:
    """Run `pamm ablate ARGUMENTS`. Returns 1 where a row failed. Raises ConfigError."""
    own = arguments_parser()
    args, overrides = own.parse_known_args(arguments)
    table = get_table(args.table)
    if args.base and table.fixed:
        raise ConfigError(f"--base: the rows of '{table.name}' name their recipes; leave it out")
    if args.tasks:
        overrides = ["--tasks", *args.tasks, *overrides]
    if args.split and table.curve:
        raise ConfigError(f"--split: '{table.name}' shows the evaluations of a training, which are on its own split")
    from pamm.ablate.runs import make_plan, train_all
    from pamm.ablate.splits import check_splits, measure_all
    from pamm.runtime.distributed import is_first_process

    plan = make_plan(
        table,
        chosen_rows(table, args.only),
        base=args.base or table.base,
        seeds=args.seeds,
        out=args.out,
        resolve=lambda recipe: parse_experiment("train", [recipe, *overrides])[0],
        split=args.split,
    )
    first = is_first_process()
    say = print if first else lambda line: None
    if args.dry_run:
        for run in plan.runs:
            say(f"{run.label}, seed {run.seed}: {run.recipe}, {run.folder}: {run.state()}")
        failed = plan.failed
    elif args.report:
        failed = plan.failed
    else:
        check_splits(plan)
        args.out.mkdir(parents=True, exist_ok=True)
        failed = train_all(plan, progress=not args.quiet, say=say)
        failed |= measure_all(plan, progress=not args.quiet, say=say)
    if first and not args.dry_run:
        write(plan, args.out, failed)
    for label, reason in failed.items() if first else ():
        print(f"failed: {label}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def write(plan: Plan, out: Path, failed: dict[str, str]) -> None:
    """Print the table of what is finished, and write it as <out>/<table>.md and <out>/<table>.json."""
    from pamm.ablate import result
    from pamm.ablate.splits import results_on
    from pamm.files import replace_text, shown

    rows = result.collect(plan)
    if failed and not any(row.scores for row in rows):
        reasons = "; ".join(f"{label}: {reason}" for label, reason in failed.items())
        raise ConfigError(f"no row of '{plan.table.name}' has results. {reasons}")
    if not any(row.scores for row in rows):
        states = "; ".join(dict.fromkeys(run.state() for run in plan.runs))
        wanted = " and measured on the splits of --split" if plan.splits else ""
        raise ConfigError(
            f"no run of '{plan.table.name}' in {out} is finished{wanted} ({states}). Give the --out, --seeds and settings "
            "that the runs were made with, or run without --report"
        )
    add_costs(plan, rows)
    tasks = list(dict.fromkeys(task for run in plan.runs for task in run.experiment.tasks))
    measured = [found for run in plan.runs if (found := results_on(run, plan.splits))]
    protocol = next(("; ".join(texts) for _, texts in measured if any(texts)), "")
    page, data = out / f"{plan.table.name}.md", out / f"{plan.table.name}.json"
    text, markdown = result.written(plan, rows, tasks, protocol)
    replace_text(page, markdown)
    replace_text(data, json.dumps(result.as_json(plan, rows, protocol, failed), indent=1, ensure_ascii=False) + "\n")
    print(text)
    print(f"written: {shown(page, 300)}, {shown(data, 300)}")


def add_costs(plan: Plan, rows: list[RowResult]) -> None:
    """Count parameters and arithmetic of every row, where the table shows them; one network per task is summed."""
    if not plan.table.cost:
        return
    from pamm.ablate.cost import Cost, count_cost
    from pamm.build import create_tasks

    for row in rows:
        runs = plan.of(row.label, plan.seeds[0])
        if runs:
            counts = [count_cost(run.experiment, create_tasks(run.experiment)) for run in runs]
            row.cost = Cost(sum(c.parameters for c in counts), sum(c.multiply_adds for c in counts))


def chosen_rows(table: AblationTable, only: str | None) -> list[AblationRow]:
    """The rows named by label, recipe or variant, comma-separated; all by default. Raises ConfigError."""
    if not only:
        return list(table.rows)
    names = [name.strip() for name in only.split(",") if name.strip()]
    called = {name: row for row in table.rows for name in (row.recipe.lstrip("+"), row.recipe, row.label)}
    for name in names:
        if name not in called:
            raise ConfigError(
                f"--only: '{name}' is no row of '{table.name}'; its rows: {', '.join(row.label for row in table.rows)}"
            )
    chosen = [called[name] for name in names]
    return [row for row in table.rows if row in chosen]


def seeds(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers, comma-separated."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"found '{text}', expected seeds as in 0,1,2") from None


def arguments_parser() -> argparse.ArgumentParser:
    """The arguments; what is not among them overrides leaves of the experiment."""
    listed = "\n".join(f"  {table.name:<12}{table.title}, from {table.base}" for table in TABLES.values())
    own = argparse.ArgumentParser(
        prog="pamm ablate",
        description="Train the rows of a table, or go on with them, and print it.",
        epilog=f"tables:\n{listed}\n\nOverrides go to every row, as in `pamm train`: --train.steps 2000 --data.root FOLDER",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    own.add_argument("table", help="one of the tables below")
    own.add_argument("--base", metavar="RECIPE", help="derive the rows from this recipe or experiment.yaml")
    own.add_argument("--seeds", type=seeds, default=(0,), help="as in 0,1,2 (default: 0)")
    own.add_argument("--out", type=Path, default=Path("runs/ablate"), help="runs and table (default: %(default)s)")
    own.add_argument("--only", metavar="ROW,...", help="only these rows, by label, variant or recipe")
    add_tasks(own)
    own.add_argument(
        "--split",
        metavar="[TASK=]NAME,...",
        help="measure finished runs on this split, or some tasks on one, as in edge=test_new (default: as in training, val)",
    )
    own.add_argument("--dry-run", action="store_true", help="list the runs and how far each is")
    own.add_argument("--report", action="store_true", help="print the table of what is finished; train nothing")
    own.add_argument("--quiet", action="store_true", help="no progress bar")
    return own
