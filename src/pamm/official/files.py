"""The tensors of a checkpoint file, read so that nothing in the file is executed."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pamm.files import shown
from pamm.models.weights import plain_names
from pamm.official.names import OfficialError

WRAPPERS = ("model", "state_dict")
"""Keys under which a whole checkpoint holds its weights."""


def read_state(source: Mapping[str, Tensor] | str | Path) -> dict[str, Tensor]:
    """Key → tensor, unwrapped and without what wrappers put into its key, in the checkpoint's order. Raises OfficialError."""
    where, content = ("the given mapping", source) if isinstance(source, Mapping) else (source, read_file(Path(source)))
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise OfficialError(f"{where} holds a {type(content).__name__}, expected tensors by name")
    return named_tensors(content, str(where))


def named_tensors(content: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """The same tensors under their own names (see `plain_name`).

    Raises OfficialError for an entry that is none, or not of plain numbers, and for two of one name.
    """
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise OfficialError(
                f"{where}: the entry {key!r} is a {type(value).__name__}, expected only tensors by name, plainly or under "
                f"{' or '.join(map(repr, WRAPPERS))}"
            )
        check_numbers(f"{where}: '{key}'", value)
    names, clashes = plain_names(content)
    if clashes:
        raise OfficialError(
            f"{where} holds two weights of one name: {shown(' and '.join(clashes[0]), 200)}. Give only the set that is meant"
        )
    return {names[key]: value for key, value in content.items()}


def check_numbers(what: str, tensor: Tensor) -> None:
    """Raise OfficialError unless the tensor is a plain array of real, finite numbers."""
    if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
        raise OfficialError(
            f"{what} is {tensor.dtype} of layout {tensor.layout}, expected a plain tensor of real numbers"
        )
    if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
        raise OfficialError(
            f"{what} holds numbers that are not finite: the training diverged, or the file is damaged. Use an earlier "
            "checkpoint, or download it again"
        )


def read_file(path: Path) -> Any:
    """What a `torch.save` or safetensors file holds, on the CPU. Raises OfficialError."""
    path = path.expanduser()
    if not path.is_file():
        raise OfficialError(f"no file at {path}; give a checkpoint downloaded from its authors")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():  # torch warns of pickle protocols before it refuses what it cannot read
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds for damaged files and for pickles that hold other than tensors
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise OfficialError(
                f"{path} asks for {foreign[1]}, which is no tensor, number or string; nothing of it was executed, because a "
                "pickle can run any code. Where you trust the file, save its weights alone: torch.save({'model': weights}, file)"
            ) from error
        told = "" if isinstance(error, pickle.UnpicklingError) else f": {(str(error).splitlines() or [''])[0]}"
        raise OfficialError(
            f"{path} is damaged, or neither a file of torch.save nor a .safetensors file ({type(error).__name__}{told}). "
            "Download it again"
        ) from error
