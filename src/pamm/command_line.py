"""Parts that all commands share: their table, their parsers, experiments from arguments, and printing.

Nothing heavy is imported before a command needs it, so that `pamm --help` is instant.
"""

from __future__ import annotations

import argparse
import codecs
import io
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pamm.files import escape, escaped, shown

if TYPE_CHECKING:
    from pamm.config.experiment import Experiment

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": (
        "train a small network on synthetic rooms and write a report, in minutes on a CPU",
        "pamm.training.command:demo",
    ),
    "train": ("train a recipe, or go on where its run stopped", "pamm.training.command:train"),
    "eval": ("measure every task of a trained network on a split", "pamm.evaluation.command:main"),
    "predict": ("predict every task for images, folders or globs", "pamm.prediction.command:main"),
    "import": (
        "turn a published checkpoint into a model of this package",
        "pamm.official.command:main",
    ),
    "data": ("check a data set, or make the synthetic one", "pamm.data.command:main"),
    "bench": ("measure speed and memory: scan, model, train, data, scaling, all, report", "pamm.cli:bench"),
    "boundary": (
        "ODS, OIS and AP of a folder of boundary maps, without MATLAB",
        "pamm.evaluation.boundaries.command:main",
    ),
    "look": ("look inside: predictions side by side, features, router weights, scan orders", "pamm.look.command:main"),
    "ablate": ("train the rows of a paper's table, or go on with them, and print it", "pamm.ablate.command:main"),
    "recipes": ("list the recipes, or print one", "pamm.config.recipes.command:main"),
    "doctor": ("list the engines, kernels and extras of this machine, with remedies", "pamm.doctor:main"),
}
"""Command → its help line and the function of its arguments that runs it, imported when it is called."""


def parser(name: str, **options: Any) -> argparse.ArgumentParser:
    """An argument parser for a command, described by its help line."""
    return argparse.ArgumentParser(prog=f"pamm {name}", description=COMMANDS[name][0], allow_abbrev=False, **options)


def at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below `smallest`."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"found '{text}', expected a whole number from {smallest} up")
        return int(text)

    return number


def add_kernels(parser: argparse.ArgumentParser) -> None:
    """The option --kernels, for every command that runs a network."""
    text = "auto: faster modules in the place of the network's own (see `pamm doctor`); off: the network as it is"
    parser.add_argument("--kernels", default="auto", choices=["auto", "off"], help=text)


def precision(text: str) -> str:
    """An argparse type: a precision, by our word or an earlier one."""
    from pamm.config.renamed import precision_name
    from pamm.config.strict import ConfigError

    try:
        return precision_name(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_precision(parser: argparse.ArgumentParser, *, default: str | None = "fp32") -> None:
    """The option --precision, for every command that runs a network."""
    text = "arithmetic of matrix products; auto: bf16 on a CPU with units for it (see `pamm doctor`), else fp32"
    names = "{fp32,bf16,fp16,auto}" if default else "{fp32,bf16,auto}"
    parser.add_argument("--precision", type=precision, default=default, metavar=names, help=text)


DEVICES = ("auto", "cpu", "cuda", "mps")
"""Kinds of device; auto: CUDA, Apple's MPS or the CPU, the first there is."""


def add_device(parser: argparse.ArgumentParser, *, several: bool = False, default: str | None = "auto") -> None:
    """The option --device, for every command that runs a network. several: and --devices, the number of processes."""
    if not several:  # any device of torch
        text = "auto, cpu, cuda or mps; cuda:1 is the second GPU (default: the first there is of cuda, mps, cpu)"
        parser.add_argument("--device", default=default, help=text)
        return
    parser.add_argument(
        "--device", choices=DEVICES, default=default, help="default: the first there is of cuda, mps, cpu"
    )
    parser.add_argument("--accelerator", choices=DEVICES, dest="device", help=argparse.SUPPRESS)  # its earlier name
    count = "processes, one device each (default: 1)"
    parser.add_argument("--devices", type=at_least(1), default=1 if default else None, help=count)


def add_root(parser: argparse.ArgumentParser) -> None:
    """The option --data.root, or --root, for every command that reads a data set."""
    text = "folder of the data set, in place of the configured one"
    parser.add_argument("--data.root", "--root", dest="root", metavar="FOLDER", help=text)


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """The option --tasks, see `split_names`."""
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks, e.g. semseg depth")


def split_names(given: Iterable[str] | None) -> list[str]:
    """The names in the values of an option, which may be separated by spaces or by commas."""
    return [name.strip() for value in given or () for name in value.split(",") if name.strip()]


def check_writable(folder: Path) -> None:
    """Create the folder and check that files can be written into it, before any work. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink()


# -- experiments ---------------------------------------------------------------------------------------------------------


def parse_experiment(name: str, arguments: list[str]) -> tuple[Experiment, argparse.Namespace]:
    """`RECIPE [--out F] [--tasks a b] [--section.key value ...]` → the experiment and the plain arguments.

    RECIPE is a recipe's name or an experiment.yaml. Raises ConfigError; a wrong override ends the process with code 2.
    """
    from pamm.config.strict import ConfigError

    own = parser(
        name, epilog="Every leaf of the experiment can be set: see `pamm train RECIPE --help`.", add_help=False
    )
    own.add_argument("recipe", help="a name that `pamm recipes` lists, or an experiment.yaml")
    own.add_argument(
        "--out", type=Path, help="run folder (default: runs/RECIPE, on a folder of your own runs/RECIPE-FOLDER)"
    )
    add_tasks(own)
    add_root(own)
    own.add_argument(
        "--init", metavar="SOURCE", help="start from the weights of a run, a saved model or a hub repository"
    )
    own.add_argument("--freeze", metavar="backbone[:N]", help="do not train the backbone, or its first N blocks")
    add_device(own, several=True, default=None)
    add_precision(own, default=None)
    own.add_argument("--quiet", action="store_true", help="no progress bar")
    add_kernels(own)
    if arguments[:1] in (["-h"], ["--help"]):
        print(own.format_help())
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        own.error(f"give the recipe first: pamm {name} RECIPE [options]")
    args, rest = own.parse_known_args(arguments)
    from pamm.config.recipes import named_experiment

    experiment = named_experiment(args.recipe)
    if args.tasks:
        chosen = split_names(args.tasks)
        unknown = [task for task in chosen if task not in experiment.tasks]
        if unknown:
            raise ConfigError(
                f"--tasks: '{unknown[0]}' is none of this experiment's tasks: {', '.join(experiment.tasks)}"
            )
        experiment = replace(experiment, tasks={task: experiment.tasks[task] for task in chosen})
    leaves = ("init", "freeze", "device", "devices", "precision")
    given = {name: value for name in leaves if (value := getattr(args, name)) is not None}
    root = experiment.data.root if args.root is None else args.root
    experiment = replace(experiment, data=replace(experiment.data, root=root), train=replace(experiment.train, **given))
    experiment = with_overrides(experiment, rest, f"pamm {name} {args.recipe}")
    is_file = Path(args.recipe).suffix in (".yaml", ".yml")
    if experiment.data.name == "folder" and not (args.tasks or is_file):
        experiment = with_tasks_of_folder(experiment)
    return experiment, args


def with_tasks_of_folder(experiment: Experiment) -> Experiment:
    """A recipe for a folder, with those of its tasks that the folder has labels for; prints which. Raises DataError."""
    from pamm.build import label_options
    from pamm.runtime.distributed import is_first_process

    described = label_options(experiment)
    tasks = {name: task for name, task in experiment.tasks.items() if name in described}
    absent = [name for name in experiment.tasks if name not in described]
    if not tasks or not absent:
        return experiment
    if is_first_process():
        print(f"tasks: {', '.join(tasks)} ({shown(experiment.data.root, 300)} has no labels for {', '.join(absent)})")
    return replace(experiment, tasks=tasks)


def with_overrides(experiment: Experiment, arguments: list[str], program: str) -> Experiment:
    """The experiment with the leaves that `--section.key value ...` set.

    Raises ConfigError; a word that is no override ends the process with code 2.
    """
    import tyro

    from pamm.build import check_options, options_help
    from pamm.config.experiment import Experiment, check
    from pamm.config.strict import ConfigError

    given, rest = take_task_options(map(with_new_name, arguments))
    for task in given:
        if task not in experiment.tasks:
            raise ConfigError(
                f"--tasks.{task}.options: '{task}' is none of this experiment's tasks: {', '.join(experiment.tasks)}"
            )
    asks = {"-h", "--help"}.intersection(rest)
    style = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    without_options = replace(
        experiment, tasks={name: replace(task, options={}) for name, task in experiment.tasks.items()}
    )
    text = options_help(experiment) if asks else None
    parsed = tyro.cli(Experiment, default=without_options, args=rest, prog=program, config=style, description=text)
    options = {name: task.options | given.get(name, {}) for name, task in experiment.tasks.items()}
    tasks = {name: replace(task, options=options[name]) for name, task in parsed.tasks.items()}
    experiment = replace(parsed, tasks=tasks)
    check(experiment)
    check_options(experiment)
    return experiment


def with_new_name(argument: str) -> str:
    """`--train.recompute`, or another earlier name of a leaf, → its option now. Raises ConfigError where its values changed."""
    from pamm.config.renamed import RENAMED
    from pamm.config.strict import ConfigError

    option, equals, value = argument.partition("=")
    path = option.removeprefix("--").replace("-", "_")
    if not option.startswith("--") or path not in RENAMED:
        return argument
    new = f"{path.rpartition('.')[0]}.{RENAMED[path]}"
    if path.endswith(".taps"):
        raise ConfigError(f"--{path} is called --{new} now, and its blocks or stages are counted from 0")
    return f"--{new}{equals}{value}"


TASK_OPTION = re.compile(r"--tasks\.([^.=]+)\.options(?:\.([^.=]+))?(?:=(.*))?", re.S)


def take_task_options(given: Iterable[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Take `--tasks.TASK.options.OPTION VALUE ...` out of the arguments: task → option → value, and the arguments left.

    One value is what YAML makes of it (`true`, `0.8`, `seism`, `[sky, tree]`), several are a list of texts. Dashes in names are
    underscores. Raises ConfigError for an option without a name or a value.
    """
    from pamm.config.strict import ConfigError

    taken: dict[str, dict[str, Any]] = {}
    arguments, left, index = list(given), [], 0
    while index < len(arguments):
        found = TASK_OPTION.fullmatch(arguments[index])
        index += 1
        if found is None:
            left.append(arguments[index - 1])
            continue
        task, option, value = found.groups()
        values = [] if value is None else [value]
        while value is None and index < len(arguments) and not arguments[index].startswith("--"):
            values.append(arguments[index])
            index += 1
        if option is None or not values:
            given = f"{option} VALUE" if option else "OPTION VALUE"
            raise ConfigError(
                f"{found[0]}: expected --tasks.{task}.options.{given}, e.g. --tasks.edge.options.protocol seism"
            )
        taken.setdefault(task.replace("-", "_"), {})[option.replace("-", "_")] = (
            _value(values[0]) if len(values) == 1 else values
        )
    return taken, left


def _value(text: str) -> Any:
    """A number, true or false, a list or a text, as YAML reads it; what is no YAML is a text."""
    import yaml

    from pamm.config.strict_yaml import load_yaml

    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


# -- printing to terminals, pipes and files of any encoding, open or closed ----------------------------------------------

PLAIN = dict(
    zip(
        "→←↑↓×–—−…≥≤±Δ§⊙",
        ["->", "<-", "^", "v", "x", "-", "-", "-", "...", ">=", "<=", "+-", "d", "S", "o"],
        strict=True,
    )
)
"""Signs of printed tables → what stands for them where the output's encoding has no such character."""


def say(text: str) -> None:
    """Print to standard error; what a terminal would obey, which may come from a file's name, is escaped."""
    print(escaped(text, keep="\n"), file=sys.stderr)


def print_any_character() -> None:
    """From now on a character that the output cannot encode, among them bytes of a file's name, is replaced and no error."""

    def replace(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        signs = error.object[error.start : error.end]
        return "".join(PLAIN.get(sign) or escape(sign) for sign in signs), error.end

    codecs.register_error("pamm", replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="pamm")


def leave_lost_output() -> bool:
    """Whether standard output or error cannot be written (tested with a line end); pending output is then dropped."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and hasattr(stream, "buffer")]
    for stream in streams:
        try:
            place = stream.fileno()
            stream.flush()
            os.write(place, b"\n")
        except io.UnsupportedOperation:  # a stream in memory
            continue
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            places = [other.fileno() for other in streams]
            for lost in [other for other in places if os.path.sameopenfile(other, place)]:  # both after `2>&1`
                os.dup2(nowhere, lost)
            os.close(nowhere)
            return True
    return False
