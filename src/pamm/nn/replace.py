"""Modules in the place of others that keep their parameters and names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def taking_over(kind: type[Module], module: nn.Module, expected: type[nn.Module]) -> Module | None:
    """A module of class `kind`, a subclass of `expected`, in the state of `module`; None unless that is an `expected` itself.

    Parameters, buffers, submodules, hooks and settings are the same objects, so that whoever holds one of them, an optimizer
    or a hook's handle, need not know of the change. A compiled call is not taken over.
    """
    if type(module) is not expected:
        return None
    new = kind.__new__(kind)
    nn.Module.__init__(new)
    new.__dict__.update({name: value for name, value in module.__dict__.items() if name != "_compiled_call_impl"})
    return new


def replace_modules(root: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> list[str]:
    """Put `replacement(module)` in the place of every module inside `root` for which it is not None; returns their names.

    A module that stands at several places is replaced by one and the same.
    """
    found: dict[nn.Module, nn.Module | None] = {}
    names = []
    for name, module in list(root.named_modules(remove_duplicate=False)):
        if not name:
            continue
        if module not in found:
            found[module] = replacement(module)
        new = found[module]
        if new is not None:
            parent, _, own = name.rpartition(".")
            setattr(root.get_submodule(parent), own, new)
            names.append(name)
    return names
