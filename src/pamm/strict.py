"""A tree of frozen dataclasses ↔ plain values, strictly: an unknown key and a value of another type are errors."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from difflib import get_close_matches
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was found and what was expected."""


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
            f"{where.rstrip('.') or kind.__name__}: expected a mapping of keys to values, found {values!r}"
        )
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            near = get_close_matches(str(key), hints, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"unknown key '{where}{key}'.{hint} Known keys: {', '.join(hints)}")
    return kind(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """One value to the annotated type `hint`, or ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _plain(value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{where}.")
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: found {value!r}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        members = tuple(a for a in arguments if a is not type(None))
        return _convert(_member(members, value, where) if len(members) > 1 else members[0], value, where)
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise ConfigError(f"{where}: found {len(value)} values {list(value)}, expected {len(kinds)}")
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML reads 1e-5, without a point, as text
            return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ConfigError(f"{where}: found {value!r} ({type(value).__name__}), expected {_describe(hint)}")


def _plain(value: Any, where: str) -> Any:
    """A value whose meaning is judged elsewhere: a scalar or a list of scalars."""
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = type(value).__name__
    raise ConfigError(f"{where}: found {value!r} ({kind}), expected a number, true or false, a text or a list of them")


def _member(members: tuple[type, ...], value: Any, where: str) -> type:
    """The dataclass of a union that a mapping is meant for, or ConfigError.

    The members share a field of literals, such as `system`, whose values tell them apart; a mapping without that field means
    the first member.
    """
    hints = [typing.get_type_hints(member) for member in members]
    for tag in hints[0]:
        choices = [typing.get_args(h[tag]) if typing.get_origin(h.get(tag)) is Literal else () for h in hints]
        known = sum(choices, ())
        if all(choices) and len(set(known)) == len(known):
            break
    if not isinstance(value, dict) or tag not in value:
        return members[0]
    for member, own in zip(members, choices, strict=True):
        if value[tag] in own:
            return member
    raise ConfigError(f"{where}.{tag}: found {value[tag]!r}, expected one of {', '.join(map(repr, known))}")


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
