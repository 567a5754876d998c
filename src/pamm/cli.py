"""The command `pamm`. Each subcommand imports what it needs when it runs, so that `pamm --help` is instant."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pamm.command_line import add_kernels
from pamm.files import shown
from pamm.terminal import leave_lost_output, print_any_character, say

if TYPE_CHECKING:
    from pamm.config.experiment import Experiment

PRECISION_HELP = (
    "arithmetic of matrix products; auto: bfloat16 on a CPU with units for it (see `pamm doctor`), else float32"
)

COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {}


def command(help_line: str) -> Callable[[Callable[[list[str]], int]], Callable[[list[str]], int]]:
    """Register a function of the remaining arguments as a subcommand under its name."""

    def register(run: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
        COMMANDS[run.__name__] = (help_line, run)
        return run

    return register


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand. Returns the exit code: 0 done, 1 the work failed, 2 the command line is wrong."""
    print_any_character()
    try:
        try:
            return run(sys.argv[1:] if arguments is None else arguments)
        finally:  # here, not when Python ends: there a closed pipe or a full disk would be told in its own words
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
    except KeyboardInterrupt as error:
        say(f"\npamm: {str(error) or 'interrupted'}")
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and leave_lost_output():
            if isinstance(error, BrokenPipeError):  # `pamm ... | head`: the reader has enough
                return 141
            say(f"pamm: standard output cannot be written ({error.strerror})")
            return 1
        if (text := told(error)) is None:
            raise
        say(f"pamm: {text}")
        return 1


def run(arguments: list[str]) -> int:
    """As `main`, without its care for errors."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"pamm {version('pamm')}")
        return 0
    if arguments[0] not in COMMANDS:
        say(f"pamm: unknown command '{shown(arguments[0])}'\n\n{usage()}")
        return 2
    return COMMANDS[arguments[0]][1](arguments[1:])


def told(error: Exception) -> str | None:
    """What to say of an error: of one of this package's own, a missing extra, a file's error, a lack of memory; else None."""
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("pamm"):
        return f"{error}. Install the missing extra: pip install 'pamm[train,demo]'"
    if isinstance(error, OSError) and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return f"{shown(name, 300)}: {error.strerror}. Choose another place, or free space or permissions there"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # of a write, which names no file
        return f"{error.strerror}. Free some space, or write to another disk"
    if type(error).__module__.startswith("pamm."):
        return str(error)
    from pamm.runtime.workers import exhausted

    return exhausted(error)


def is_first_process() -> bool:
    """Whether this process prints, of those that Fabric, torchrun or SLURM started."""
    return all(int(os.environ.get(key, 0)) == 0 for key in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def usage() -> str:
    """The text of `pamm --help`."""
    lines = "\n".join(f"  {name:<9} {help_line}" for name, (help_line, _) in COMMANDS.items())
    return (
        "usage: pamm COMMAND ...\n\n"
        "Multi-task dense prediction: one image in; segmentation, human parts, depth, surface normals, saliency and object\n"
        f"boundaries out.\n\ncommands:\n{lines}\n\n`pamm COMMAND --help` tells a command's arguments."
    )


def check_writable(folder: Path) -> None:
    """Create the folder and try to write in it, before hours are spent; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink()


def parser(name: str, **options: object) -> argparse.ArgumentParser:
    """An argument parser for a subcommand, described by its help line."""
    return argparse.ArgumentParser(prog=f"pamm {name}", description=COMMANDS[name][0], allow_abbrev=False, **options)


def parse_experiment(name: str, arguments: list[str]) -> tuple[Experiment, argparse.Namespace]:
    """`RECIPE [--out F] [--tasks a,b] [--section.key value ...]` → the experiment and the plain arguments.

    RECIPE is a recipe's name or an experiment.yaml. Raises ConfigError; a wrong override ends the process with code 2.
    """
    from dataclasses import replace

    from pamm.config.strict import ConfigError

    own = parser(
        name, epilog="Every leaf of the experiment can be set: see `pamm train RECIPE --help`.", add_help=False
    )
    own.add_argument("recipe", help="a name that `pamm recipes` lists, or an experiment.yaml")
    own.add_argument(
        "--out", type=Path, help="run folder (default: runs/RECIPE, on a folder of your own runs/RECIPE-FOLDER)"
    )
    own.add_argument("--tasks", help="only these tasks, e.g. semseg,depth")
    own.add_argument(
        "--init", metavar="SOURCE", help="start from the weights of a run, a saved model or a hub repository"
    )
    own.add_argument("--freeze", metavar="backbone[:N]", help="do not train the backbone, or its first N blocks")
    own.add_argument("--quiet", action="store_true", help="no progress bar")
    add_kernels(own)
    if arguments[:1] in (["-h"], ["--help"]):
        print(own.format_help())
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        own.error(f"give the recipe first: pamm {name} RECIPE [options]")
    plain, rest = own.parse_known_args(arguments)
    from pamm.config.recipes import named_experiment

    experiment = named_experiment(plain.recipe)
    if plain.tasks:
        chosen = [task.strip() for task in plain.tasks.split(",") if task.strip()]
        unknown = [task for task in chosen if task not in experiment.tasks]
        if unknown:
            raise ConfigError(
                f"--tasks: '{unknown[0]}' is none of this experiment's tasks: {', '.join(experiment.tasks)}"
            )
        experiment = replace(experiment, tasks={task: experiment.tasks[task] for task in chosen})
    given = {name: value for name in ("init", "freeze") if (value := getattr(plain, name)) is not None}
    experiment = replace(experiment, train=replace(experiment.train, **given))
    experiment = with_overrides(experiment, rest, f"pamm {name} {plain.recipe}")
    is_file = Path(plain.recipe).suffix in (".yaml", ".yml")
    if experiment.data.name == "folder" and not (plain.tasks or is_file):
        experiment = with_tasks_of_folder(experiment)
    return experiment, plain


def with_tasks_of_folder(experiment: Experiment) -> Experiment:
    """A recipe for anybody's folder with those of its tasks that the folder has labels for; tells which. Raises DataError."""
    from dataclasses import replace

    from pamm.build import label_options

    described = label_options(experiment)
    tasks = {name: task for name, task in experiment.tasks.items() if name in described}
    absent = [name for name in experiment.tasks if name not in described]
    if not tasks or not absent:
        return experiment
    if is_first_process():
        print(f"tasks: {', '.join(tasks)} ({shown(experiment.data.root)} has no labels for {', '.join(absent)})")
    return replace(experiment, tasks=tasks)


def with_overrides(experiment: Experiment, arguments: list[str], program: str) -> Experiment:
    """The experiment with the leaves that `--section.key value ...` set.

    Raises ConfigError; a word that is no override ends the process with code 2.
    """
    from dataclasses import replace

    import tyro

    from pamm.command_line import take_task_options
    from pamm.build import check_options, options_help
    from pamm.config.experiment import Experiment, check
    from pamm.config.strict import ConfigError

    given, rest = take_task_options(arguments)
    for task in given:
        if task not in experiment.tasks:
            raise ConfigError(
                f"--tasks.{task}.options: '{task}' is none of this experiment's tasks: {', '.join(experiment.tasks)}"
            )
    asks = {"-h", "--help"}.intersection(rest)
    style = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    plain = replace(experiment, tasks={name: replace(task, options={}) for name, task in experiment.tasks.items()})
    text = options_help(experiment) if asks else None
    parsed = tyro.cli(Experiment, default=plain, args=rest, prog=program, config=style, description=text)
    options = {name: task.options | given.get(name, {}) for name, task in experiment.tasks.items()}
    tasks = {name: replace(task, options=options[name]) for name, task in parsed.tasks.items()}
    experiment = replace(parsed, tasks=tasks)
    check(experiment)
    check_options(experiment)
    return experiment


@command("train a small network on synthetic rooms and write a report, in minutes on a CPU")
def demo(arguments: list[str]) -> int:
    from pamm.training.demo import run_demo

    experiment, plain = parse_experiment("demo", ["demo", *arguments])
    check_writable(plain.out or Path("runs/demo"))
    run_demo(experiment, plain.out or Path("runs/demo"), progress=not plain.quiet, kernels=plain.kernels)
    return 0


def run_folder(experiment: Experiment) -> Path:
    """Where a run is kept unless its user says: runs/RECIPE; one on somebody's own folder has that folder's name as well.

    Otherwise two folders would share a run.
    """
    own = experiment.data.root if experiment.data.name == "folder" else None
    folder = os.path.basename(os.path.realpath(os.path.expanduser(own))) if own else ""
    return Path("runs") / "-".join(filter(None, [experiment.name, folder]))


@command("train a recipe, or go on where its run stopped")
def train(arguments: list[str]) -> int:
    experiment, plain = parse_experiment("train", arguments)
    from pamm.training.run import train as run

    out = plain.out or run_folder(experiment)
    check_writable(out)
    result = run(experiment, out, progress=not plain.quiet, kernels=plain.kernels)
    if is_first_process():
        from pamm.build import create_tasks
        from pamm.drawing.page import format_table

        print(format_table([(experiment.name, result.row)], create_tasks(experiment)))
        print(f"{result.protocol}\nrun folder: {out}, weights: best (step {result.model['step']})")
    return 0


@command("measure every task of a trained network on a split")
def evaluate(arguments: list[str]) -> int:
    from pamm.evaluation.command import main as run

    return run(arguments)


COMMANDS["eval"] = COMMANDS.pop("evaluate")


@command("predict every task for images, folders or globs")
def predict(arguments: list[str]) -> int:
    from pamm.prediction.command import main as run

    return run(arguments)


@command("turn a published PAMM or MTMamba checkpoint into a model of this package")
def import_checkpoint(arguments: list[str]) -> int:
    own = parser("import")
    own.add_argument("checkpoint", type=Path, help="file of torch.save or .safetensors; nothing in it is executed")
    own.add_argument(
        "--out", type=Path, required=True, help="new folder for the weights (safetensors) and the settings"
    )
    own.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="pixels (default: the checkpoint's)")
    own.add_argument("--checkpoint-size", type=int, nargs=2, metavar=("H", "W"), help="pixels it was trained at")
    own.add_argument("--num-heads", type=int, help="attention heads of a vision transformer (default: width / 64)")
    own.add_argument(
        "--scan",
        choices=["hilbert", "snake", "morton", "h", "s", "z"],
        help="scan orders of a PAMM, by our or the published name, which its checkpoint does not tell (default: hilbert)",
    )
    plain = own.parse_args(arguments)
    from pamm.official import OfficialError, load
    from pamm.training.checkpoint import save_checkpoint

    if plain.out.exists() and (plain.out.is_file() or any(plain.out.iterdir())):
        raise OfficialError(f"{plain.out} exists already; choose another folder, or remove it")
    sizes = {"image_size": plain.image_size, "checkpoint_size": plain.checkpoint_size}
    sizes = {name: tuple(size) for name, size in sizes.items() if size}
    model = load(plain.checkpoint, num_heads=plain.num_heads, scan=plain.scan, **sizes)
    save_checkpoint(plain.out, model)
    print(f"{model.load_report}\nmodel folder: {plain.out}")
    return 0


COMMANDS["import"] = COMMANDS.pop("import_checkpoint")


@command("check a data set, or make the synthetic one")
def data(arguments: list[str]) -> int:
    own = parser("data")
    own.add_argument(
        "source",
        metavar="FOLDER|RECIPE",
        help="a folder data set, a recipe's name or an experiment.yaml; of equal names the recipe's is meant, ./NAME the folder",
    )
    own.add_argument("--root", help="with a recipe: folder of the data set, in place of the configured one")
    own.add_argument("--deep", action="store_true", help="read every file; tell what labels hold and all that is wrong")
    own.add_argument(
        "--val-fraction", type=float, help="as data.val_fraction: share of train that is the validation split"
    )
    plain = own.parse_args(arguments)
    from dataclasses import replace

    from pamm.build import check_options
    from pamm.data import DATASETS
    from pamm.data.inspect import format_inspection, inspect_dataset, reading_workers
    from pamm.config.experiment import Experiment, check
    from pamm.config.recipes import named_data

    experiment = named_data(plain.source, plain.root)
    config, own_options = experiment.data, {name: task.options for name, task in experiment.tasks.items()}
    check_options(experiment)
    if plain.val_fraction is not None:
        config = replace(config, val_fraction=plain.val_fraction)
        check(Experiment(data=config))
    print(f"data set: {config.name}, {shown(config.root) if config.root else 'made here, kept in the cache'}")
    if hasattr(DATASETS[config.name], "prepare"):
        for split in ("train", "val"):
            DATASETS[config.name].open(config, split, {}).prepare(workers=os.cpu_count() or 1)
    how = {"deep": plain.deep, "workers": reading_workers(), "progress": sys.stderr.isatty()}
    rows = inspect_dataset(config, options=own_options, **how)
    print(format_inspection(rows))
    return 1 if any(row.problems for row in rows) else 0


@command("measure speed and memory: scan, model, train, data, scaling, all, report")
def bench(arguments: list[str]) -> int:
    from pamm.bench.command import main as run

    return run(arguments)


@command("ODS, OIS and AP of a folder of boundary maps, without MATLAB")
def boundary(arguments: list[str]) -> int:
    from pamm.evaluation.boundaries.command import main as run

    return run(arguments)


@command("look inside: predictions side by side, features, router weights, scan orders")
def look(arguments: list[str]) -> int:
    from pamm.look.command import main as run

    return run(arguments)


@command("train the rows of a paper's table, or go on with them, and print it")
def ablate(arguments: list[str]) -> int:
    from pamm.ablate.command import main as run

    return run(arguments, lambda given: parse_experiment("train", given)[0], is_first_process)


@command("list the recipes, or print one")
def recipes(arguments: list[str]) -> int:
    import yaml

    from pamm.config.recipes import MTMAMBA_VARIANTS, RECIPES, VARIANTS, get_recipe
    from pamm.config.strict import to_dict

    own = parser("recipes")
    own.add_argument("recipe", nargs="?", help="print this one as YAML")
    name = own.parse_args(arguments).recipe
    if name:
        print(yaml.safe_dump(to_dict(get_recipe(name)), sort_keys=False), end="")
        return 0
    width = max(map(len, [*RECIPES, *VARIANTS])) + 2
    print("recipes:")
    for key, build in RECIPES.items():
        print(f"  {key:<{width}}{(build.__doc__ or '').strip().splitlines()[0]}")
    for example, variants in (("pascal-pamm-b+no-priors", VARIANTS), ("nyud-mtmamba+swin-t", MTMAMBA_VARIANTS)):
        print(f"\nvariants, as in {example}:")
        for key, (text, _) in variants.items():
            print(f"  {key:<{width}}{text}")
    return 0


@command("tell what runs on this machine and what does not, with the remedy")
def doctor(arguments: list[str]) -> int:
    from pamm.doctor import examine

    parser("doctor").parse_args(arguments)
    return examine()


if __name__ == "__main__":
    sys.exit(main())
