"""Published checkpoints: one file per paper reads its layout, recognised by keys and shapes alone."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pamm.checkpoint import CheckpointError
from pamm.models.model import MultiTaskModel

READERS = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]


def load(
    source: Mapping[str, Any] | str | PathLike[str],
    *,
    image_size: tuple[int, int],
    num_heads: int | None = None,
    scan: str = "hilbert",
    extras: Mapping[str, Tensor] | None = None,
) -> MultiTaskModel:
    """The network of a published checkpoint, given as a file or as its content, in eval mode. Raises CheckpointError."""
    state: Any = source
    if not isinstance(source, Mapping):
        try:
            state = torch.load(Path(source), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise CheckpointError(f"{source} is damaged or not a checkpoint of weights alone ({error})") from error
    state = state.get("model", state)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    for reader in READERS:
        if reader.matches(state):
            return reader.read(state, image_size=image_size, num_heads=num_heads, scan=scan, extras=extras)
    raise CheckpointError(f"a checkpoint of none of the known systems; its first keys: {', '.join(list(state)[:5])}")
