"""Names of weights, without what wrappers around a network put into them; and the errors of reading them."""

from __future__ import annotations

from collections.abc import Iterable

from pamm import PammError


class CheckpointError(PammError, RuntimeError):
    """A checkpoint that cannot be read or written; the message names the file, the cause and the remedy."""


RESTORE = "Restore it from a copy, or train into another folder (--out)"


OUTER = ("module", "model")
"""First parts of a name that distributed training and training frameworks put before every key."""

INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that torch.compile and torch's wrappers put before the names of what they wrap, at any place."""


def plain_name(key: str) -> str:
    """A weight's own name: `model._orig_mod.module.heads.x`, `heads._orig_mod.x` → `heads.x`."""
    parts = [part for part in key.split(".") if part not in INNER]
    while len(parts) > 1 and parts[0] in OUTER:
        parts = parts[1:]
    return ".".join(parts)


def plain_names(keys: Iterable[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Key → its plain name, and the pairs of keys that would share one."""
    names, clashes = dict[str, str](), list[tuple[str, str]]()
    first: dict[str, str] = {}
    for key in keys:
        names[key] = plain_name(key)
        if first.setdefault(names[key], key) != key:
            clashes.append((first[names[key]], key))
    return names, clashes


def tell_renamed(names: dict[str, str]) -> str | None:
    """A sentence about the keys that had something taken off, or None where none had."""
    changed = [(key, name) for key, name in names.items() if key != name]
    if not changed:
        return None
    key, name = changed[0]
    return f"{len(changed)} of {len(names)} names of weights were taken without their wrapper's parts, e.g. '{key}' as '{name}'"
