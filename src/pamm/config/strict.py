"""Strict conversion of a tree of frozen dataclasses from and to plain values: unknown keys and wrong types are errors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pamm import PammError
from pamm.files import shown

LARGEST_JSON = 2**24
"""Bytes of a JSON file: the names and numbers of a hundred thousand images."""


class ConfigError(PammError, ValueError):
    """A configuration that cannot be used; the message names the key, what was found and what was expected."""


def read_json(path: Path, *, finite: bool = True) -> Any:
    """As `load_json`, of a file in UTF-8 of at most LARGEST_JSON bytes. Raises ValueError and OSError."""
    with open(path, "rb") as file:
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise ValueError(f"more than {LARGEST_JSON} bytes")
    return load_json(content.decode("utf-8-sig"), finite=finite)


def load_json(text: str, *, finite: bool = True) -> Any:
    """The content of a JSON text: each key once, whole numbers below 2⁶³, others finite (or NaN too). Raises ValueError."""
    real, constant = (_float, _refuse_number) if finite else (float, float)
    try:
        return json.loads(text, parse_constant=constant, parse_int=_int, parse_float=real, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("too many lists or mappings inside each other") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key '{shown(again)}' stands twice; keep one of the two")
    return content


def _int(text: str) -> int:
    return int(text) if len(text) < 20 and abs(int(text)) < 2**63 else _refuse_number(text)


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _refuse_number(text: str) -> Any:
    raise ValueError(f"the number {shown(text, 40)} is not finite, or too large")


def to_dict(config: Any) -> Any:
    """Dataclass tree → plain dicts, lists and scalars (JSON and YAML values)."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    return config


def from_dict(kind: type, values: Any, where: str = "") -> Any:
    """Plain values → dataclass tree, strictly.

    Raises ConfigError for an unknown key (naming the known ones and the nearest) and for a value of another type.
    Missing keys keep their defaults.
    """
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where.rstrip('.') or kind.__name__}: expected a mapping of keys to values, found {_told(values)}"
        )
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            near = get_close_matches(str(key), hints, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"unknown key '{where}{shown(key)}'.{hint} Known keys: {', '.join(hints)}")
    return kind(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """One value to the annotated type `hint`, or ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _plain(value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(_subclass(hint, value, where) if hint.__subclasses__() else hint, value, f"{where}.")
    if origin is Literal:
        return check_choice(where, value, arguments)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        members = [member for member in arguments if member is not type(None)]
        lists = [member for member in members if typing.get_origin(member) is tuple]
        return _convert(lists[0] if lists and isinstance(value, (list, tuple)) else members[0], value, where)
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(arguments[1], item, f"{where}.{shown(key)}") for key, item in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise ConfigError(f"{where}: found {len(value)} values {_told(list(value))}, expected {len(kinds)}")
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # YAML reads 1e-5, without a point, as text
            value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: found {value}, expected a finite number")
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ConfigError(f"{where}: found {_told(value)} ({type(value).__name__}), expected {_describe(hint)}")


def _plain(value: Any, where: str) -> Any:
    """A value that is checked elsewhere: a scalar or a list of scalars."""
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: found {value}, expected a finite number")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = type(value).__name__
    raise ConfigError(
        f"{where}: found {_told(value)} ({kind}), expected a number, true or false, a text or a list of them"
    )


def _subclass(base: type, value: Any, where: str) -> type:
    """The subclass of a dataclass that a mapping is meant for, or ConfigError.

    They share a field of literals, such as `system`, whose values identify them: the first field of each. A mapping
    without that field means the first subclass.
    """
    tag = dataclasses.fields(base)[0].name
    known = _by_tag(base, tag)
    if not isinstance(value, dict) or tag not in value:
        return next(iter(known.values()))
    if value[tag] not in [*known] and hasattr(base, "discover"):
        base.discover()
        known = _by_tag(base, tag)
    return known[check_choice(f"{where}.{tag}", value[tag], known)]


def _by_tag(base: type, tag: str) -> dict[Any, type]:
    """Value of the field `tag`, which is one of literals → the class that has it, of all below `base`, the first first."""
    known: dict[Any, type] = {}
    for member in base.__subclasses__():
        for choice in typing.get_args(typing.get_type_hints(member)[tag]):
            known.setdefault(choice, member)
        known = _by_tag(member, tag) | known
    return known


def check_choice(where: str, found: Any, known: Iterable[Any]) -> Any:
    """`found` if it is one of the known names. Raises ConfigError, which gives them and the nearest."""
    choices = list(known)
    if any(type(found) is type(choice) and found == choice for choice in choices):
        return found
    near = get_close_matches(str(found), map(str, choices), n=1)
    hint = f". Did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"{where}: found {_told(found)}, expected one of {', '.join(map(repr, choices))}{hint}")


def _told(value: Any) -> str:
    """A value from outside as one short line."""
    try:
        return shown(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, lists inside each other
        return f"a {type(value).__name__} that is too large to show"


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
