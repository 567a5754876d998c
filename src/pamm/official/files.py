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

NUMBERS = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
"""Data types of weights and counts."""

SHARED = 4
"""How often a number may stand in a checkpoint's tensors, on average: tied weights are one storage under two names."""

LARGEST_PICKLE = 2**24
"""Bytes of the names and shapes in a file of torch.save."""


def read_state(source: Mapping[str, Tensor] | str | Path) -> dict[str, Tensor]:
    """Key → tensor, unwrapped and without what wrappers put into its key, in the checkpoint's order. Raises OfficialError."""
    given = isinstance(source, Mapping)
    where, content = ("the given mapping", source) if given else (shown(source, 200), read_file(Path(source)))
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise OfficialError(f"{where} holds a {type(content).__name__}, expected tensors by name")
    tensors = named_tensors(content, str(where))
    absent = [key for key, value in tensors.items() if value.is_meta]
    if absent and not given:
        raise OfficialError(f"{where}: '{shown(absent[0])}' has a shape and no numbers; download the file again")
    return tensors


def named_tensors(content: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """The same tensors under their own names (see `plain_name`).

    Raises OfficialError for an entry that is none, or not of plain numbers, and for two of one name.
    """
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise OfficialError(
                f"{where}: the entry {shown(repr(key))} is a {type(value).__name__}, expected only tensors by name, plainly or "
                f"under {' or '.join(map(repr, WRAPPERS))}"
            )
    check_sizes(content, where)
    for key, value in content.items():
        check_numbers(f"{where}: '{shown(key)}'", value)
    names, clashes = plain_names(content)
    if clashes:
        raise OfficialError(
            f"{where} holds two weights of one name: {shown(' and '.join(clashes[0]), 200)}. Give only the set that is meant"
        )
    return {names[key]: value for key, value in content.items()}


def check_sizes(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise OfficialError where tensors claim more numbers than there are in memory: a few bytes, repeated, would fill it."""
    claimed, held = 0, {}
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            continue
        size, storage = tensor.numel() * tensor.element_size(), tensor.untyped_storage()
        if size > storage.nbytes():
            raise OfficialError(
                f"{where}: '{shown(key)}' repeats {storage.nbytes()} bytes as {size} (shape {shown(tuple(tensor.shape))}, stride "
                f"{shown(tensor.stride())}); save plain tensors, each with its own numbers: tensor.contiguous()"
            )
        claimed += size
        held[storage.data_ptr()] = storage.nbytes()
    if claimed > SHARED * sum(held.values()):
        raise OfficialError(
            f"{where}: its tensors claim {claimed} bytes of {sum(held.values())} that are there; save each with its own numbers"
        )


def check_numbers(what: str, tensor: Tensor) -> None:
    """Raise OfficialError unless the tensor is a plain array of real, finite numbers."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.dtype in NUMBERS
    if not plain:
        raise OfficialError(
            f"{what} is {tensor.dtype} of layout {tensor.layout}, expected a plain tensor of real numbers"
        )
    if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
        raise OfficialError(
            f"{what} holds numbers that are not finite: the training diverged, or the file is damaged. Use an earlier "
            "checkpoint, or download it again"
        )


def read_file(path: Path) -> Any:
    """The content of a `torch.save` or safetensors file, on the CPU. Raises OfficialError."""
    path = path.expanduser()
    where = shown(path, 200)
    if not path.is_file():
        raise OfficialError(f"no file at {where}; give a checkpoint downloaded from its authors")
    try:
        archive = path.suffix != ".safetensors" and zipfile.is_zipfile(path)
        if archive:
            check_archive(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():  # torch warns of pickle protocols before it refuses what it cannot read
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except OfficialError:
        raise
    except Exception as error:  # torch raises many kinds for damaged files and for pickles that hold other than tensors
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise OfficialError(
                f"{where} asks for {shown(foreign[1])}, which is no tensor, number or string; nothing of it was executed, because "
                "a pickle can run any code. If you trust the file, save only its weights: torch.save({'model': weights}, file)"
            ) from error
        told = (
            "" if isinstance(error, pickle.UnpicklingError) else f": {shown((str(error).splitlines() or [''])[0], 200)}"
        )
        raise OfficialError(
            f"{where} is damaged, or neither a file of torch.save nor a .safetensors file ({type(error).__name__}{told}). "
            "Download it again"
        ) from error


def check_archive(path: Path) -> None:
    """Raise OfficialError for a zip archive that torch.save does not write: compressed, overlapping or of huge records."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    where = shown(path, 200)
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise OfficialError(
                f"{where}: the record '{shown(record.filename)}' is compressed, which torch.save never does and torch would read "
                "as numbers. Unpack the file and save its tensors again"
            )
        if record.filename.endswith(".pkl") and record.file_size > LARGEST_PICKLE:
            raise OfficialError(
                f"{where}: the record '{shown(record.filename)}' of names and shapes has {record.file_size} bytes, expected at "
                f"most {LARGEST_PICKLE}; save only the weights: torch.save({{'model': weights}}, file)"
            )
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise OfficialError(f"{where}: its records claim more bytes than the file has. Download it again")
