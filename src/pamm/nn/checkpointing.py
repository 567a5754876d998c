"""Activation checkpointing: activations inside a module are computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

_AGAIN = ContextVar("again", default=False)


def call(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs)."""
    return function(*inputs)


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs), which keeps only its inputs for the backward pass.

    The second pass repeats the random draws and the autocast. Running statistics are updated only in the first pass.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=_contexts)


def computing_again() -> bool:
    """Whether this is the backward pass, in which activations are computed again."""
    return _AGAIN.get()


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _again()


@contextmanager
def _again() -> Iterator[None]:
    token = _AGAIN.set(True)
    try:
        yield
    finally:
        _AGAIN.reset(token)
