"""What the commands' argument parsers share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from pamm.config.strict import ConfigError
from pamm.config.strict_yaml import load_yaml


def at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below `smallest`."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"found '{text}', expected a whole number from {smallest} up")
        return int(text)

    return number


TASK_OPTION = re.compile(r"--tasks\.([^.=]+)\.options(?:\.([^.=]+))?(?:=(.*))?", re.S)


def take_task_options(arguments: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Take `--tasks.TASK.options.OPTION VALUE ...` out of the arguments: task → option → value, and the arguments left.

    One value is what YAML makes of it (`true`, `0.8`, `seism`, `[sky, tree]`), several are a list of texts. Dashes in names are
    underscores. Raises ConfigError for an option without a name or a value.
    """
    taken: dict[str, dict[str, Any]] = {}
    left, index = [], 0
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
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def add_kernels(parser: argparse.ArgumentParser) -> None:
    """The option --kernels, for every command that runs a network."""
    text = "auto: faster modules in the place of the network's own (see `pamm doctor`); off: the network as it is"
    parser.add_argument("--kernels", default="auto", choices=["auto", "off"], help=text)
