"""Saved models: safetensors and settings in a folder or on the Hugging Face hub, read strictly and without running code."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pamm.config.strict import read_json
from pamm.files import first_line, shown
from pamm.models.formats import CONFIG_FILE, WEIGHTS_FILE, FormatError, read_format, upgraded_weights
from pamm.models.hub import download, repository_name
from pamm.models.model import MultiTaskModel
from pamm.models.registry import WithoutDraws, rebuild_model
from pamm.models.weights import RESTORE, CheckpointError, plain_names, tell_renamed


def load_weights(model: MultiTaskModel, path: Path) -> None:
    """Load a safetensors file into the model, every key and shape matching. Raises CheckpointError with what differs.

    Parts that a wrapper put into the keys (`module.`, `model.`, `_orig_mod.`) are taken off, with a warning.
    """
    weights = read_weights(path)
    model.load_state_dict(matched(model, weights, path))


def matched(model: MultiTaskModel, weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights under the model's own names. Raises CheckpointError, naming `path`, unless every key, shape and kind fits.

    The model may be one without memory: shapes are compared, no number is read.
    """
    try:
        weights = upgraded_weights(weights, model, read_format(path.with_name(CONFIG_FILE)))
    except FormatError as error:
        raise CheckpointError(f"{path.with_name(CONFIG_FILE)}: {error}") from error
    own, _ = plain_names(model.state_dict())
    expected = {own[key]: (key, value) for key, value in model.state_dict().items()}
    missing, foreign = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    both = sorted(expected.keys() & weights.keys())
    shapes = [
        f"{key} {list(weights[key].shape)} instead of {list(expected[key][1].shape)}"
        for key in both
        if weights[key].shape != expected[key][1].shape
    ]
    kinds = [f"{key} {weights[key].dtype}" for key in both if not _same_kind(weights[key], expected[key][1])]
    if missing or foreign or shapes or kinds:
        parts = [("missing", missing), ("unknown", foreign), ("of another shape", shapes), ("of another kind", kinds)]
        told = "; ".join(f"{len(keys)} {what}, e.g. {shown(', '.join(keys[:3]), 200)}" for what, keys in parts if keys)
        raise CheckpointError(
            f"{path} belongs to another architecture: {told}. Use the {CONFIG_FILE} saved beside the weights, or the recipe "
            "they were trained with"
        )
    return {key: weights[name] for name, (key, _) in expected.items()}


def _same_kind(given: Tensor, own: Tensor) -> bool:
    """Whether both hold real numbers of the usual precisions, or both whole ones."""
    kinds = FLOATS if own.is_floating_point() else WHOLE
    return given.dtype in kinds


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

LARGEST_HEADER = 2**23
"""Bytes of the names and shapes in a safetensors file: a thousand times those of the largest networks here."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Plain name → tensor of a safetensors file. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:  # safetensors takes a forbidden file for an absent one
            header = int.from_bytes(file.read(8), "little")
        if header > LARGEST_HEADER:
            raise ValueError(f"its header claims {header} bytes")
        weights = load_file(path)  # mapped: a number takes memory when it is read
    except FileNotFoundError:
        raise CheckpointError(
            f"no weights at {path}; expected a folder saved by `pamm train` or `save_pretrained`. {RESTORE}"
        ) from None
    except PermissionError:
        raise forbidden(path) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({first_line(error)}). {RESTORE}. Pickled weights are not read, because a "
            "pickle can run code: save the model with `save_pretrained`"
        ) from error
    names, clashes = plain_names(weights)
    if clashes:
        more = f" and {len(clashes) - 1} more pairs" if clashes[1:] else ""
        raise CheckpointError(
            f"{path} holds two weights of one name: {shown(' and '.join(clashes[0]), 200)}{more}. Save only the set that is meant"
        )
    told = tell_renamed(names)
    if told:
        warnings.warn(f"{path}: {shown(told, 300)}", stacklevel=2)
    return {names[key]: value for key, value in weights.items()}


def find_checkpoint(source: Path) -> Path:
    """The folder with weights that `source` means: itself, or the best, else the last, of a run folder.

    A run killed while it replaced a folder has it under the name `.<folder>.old`, beside the folder itself where `best` or `last`
    is a symbolic link.
    """
    try:
        kept = [place for name in ("best", "last") for place in (source / name, replaced(source / name))]
        for folder in (source, *kept):
            if (folder / CONFIG_FILE).is_file():
                return folder
        is_file = source.is_file()
    except PermissionError as error:
        raise forbidden(error.filename or source) from None
    if is_file:
        raise CheckpointError(
            f"{source} is a file; expected a run folder, or a folder with {CONFIG_FILE} and {WEIGHTS_FILE}. Pickled weights "
            "(.pt, .pth, .tar) are not read here, because a pickle can run code"
        )
    raise CheckpointError(
        f"{source} holds no checkpoint: no {CONFIG_FILE} in it, nor in best/ or last/. Train one: pamm train RECIPE --out {source}"
    )


def replaced(folder: Path) -> Path:
    """The name under which a folder is kept while another one takes its place."""
    real = Path(os.path.realpath(folder))
    return real.with_name(f".{real.name}.old")


def _is_there(path: Path) -> bool:
    try:
        os.stat(path)
    except PermissionError:
        raise forbidden(path) from None
    except (OSError, ValueError):  # absent, or no path at all
        return False
    return True


def forbidden(path: str | Path) -> CheckpointError:
    """The error for a file or a folder that the user may not read."""
    return CheckpointError(f"{path} may not be read: change its permissions, or those of the folders it lies in")


def load_model(source: str | Path, **options: Any) -> MultiTaskModel:
    """Load a saved model, in eval mode.

    Args:
        source: a run folder, a folder saved by `save_pretrained`, or a repository of the Hugging Face Hub: "hf:owner/name". The
            short form "owner/name" also works if the working directory has no folder `owner`.
        **options: for the Hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

    Returns:
        The network.

    Raises:
        CheckpointError: no model was found, or it cannot be loaded. The message names the places that were searched.
    """
    path = Path(os.path.expanduser(source))
    folder = find_checkpoint(path) if _is_there(path) else download(repository_name(str(source)), **options)
    try:
        settings = read_settings(folder / CONFIG_FILE)
        skeleton = rebuild_model(settings, "meta")
    except PermissionError:
        raise forbidden(folder / CONFIG_FILE) from None
    except FormatError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} does not describe a pamm model: {shown(error, 400)}. Restore it from a copy, or save the "
            "model again with `save_pretrained`"
        ) from error
    weights = read_weights(folder / WEIGHTS_FILE)
    matched(skeleton, weights, folder / WEIGHTS_FILE)  # the file holds all that the settings ask memory for
    with WithoutDraws():
        model = rebuild_model(settings)
    model.load_state_dict(matched(model, weights, folder / WEIGHTS_FILE))
    model.origin = folder
    return model.eval()


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a saved model's config.json. Raises ValueError and OSError."""
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"it holds a {type(settings).__name__}, expected a mapping")
    return settings
