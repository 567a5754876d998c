"""Modules in the place of others that keep their parameters and names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def taking_over(kind: type[Module], module: nn.Module, expected: type[nn.Module]) -> Module | None:
    """Make a module of a subclass that shares the state of a module.

    Parameters, buffers, submodules, hooks and settings are the same objects. An optimizer or a hook's handle that holds one of
    them therefore stays valid. A compiled call is not copied.

    Args:
        kind: the subclass of `expected`.
        module: the module.
        expected: the class that `module` must have, and no subclass of it.

    Returns:
        The new module; None if `module` is not an `expected`.
    """
    if type(module) is not expected:
        return None
    new = kind.__new__(kind)
    nn.Module.__init__(new)
    new.__dict__.update({name: value for name, value in module.__dict__.items() if name != "_compiled_call_impl"})
    return new


def replace_modules(root: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> list[str]:
    """Replace modules inside a network. A module that occurs in several places is replaced by the same new module in all of them.

    Args:
        root: the network; it is not replaced itself.
        replacement: module → its replacement, or None to keep it.

    Returns:
        Names of the replaced modules.
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
