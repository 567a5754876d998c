"""Files of a run: saved whole or not at all, read without running code.

A run folder holds `experiment.yaml`, `log.jsonl`, `last/` (weights, settings, optimizer) and `best/` (weights, settings).
Weights are safetensors; the optimizer's state is read with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pamm.experiment import ConfigError
from pamm.models.model import CONFIG_FILE, WEIGHTS_FILE, MultiTaskModel
from pamm.models.registry import rebuild_model

TRAINING_FILE = "training.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names the file, the cause and the remedy."""


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, then put it in `target`'s place; on any failure the old `target` survives.

    A process killed between the two renames leaves `<target>.old`, which `recover` puts back.
    Raises CheckpointError.
    """
    new, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    recover(target)
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        write(new)
        for file in new.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        kept = (
            f"the checkpoint saved before it, {target}, is intact" if target.exists() else "nothing was saved before it"
        )
        free = shutil.disk_usage(target.parent).free / 1e6 if target.parent.exists() else 0
        raise CheckpointError(
            f"could not save {target} ({error}); {free:.0f} MB are free there; {kept}. Free some space and run again: "
            "training goes on from the last checkpoint"
        ) from error
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Finish a replacement that was cut off between its two renames."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(target: Path, model: MultiTaskModel, training: dict[str, Any] | None = None) -> None:
    """Save weights, settings and, if given, the training state (tensors, numbers, strings, dicts, lists) atomically."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        if training is not None:
            torch.save(training, folder / TRAINING_FILE)

    replace_folder(target, write)


def load_training(target: Path, model: MultiTaskModel) -> dict[str, Any]:
    """Load the weights of `target` into `model` and return its training state. Raises CheckpointError."""
    load_weights(model, target / WEIGHTS_FILE)
    path = target / TRAINING_FILE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path} is damaged or not a training state ({_first_line(error)}); {_REMOVE}") from error


_REMOVE = "restore it from a copy, or train into another folder (--out)"


def load_weights(model: MultiTaskModel, path: Path) -> None:
    """Load a safetensors file into the model, every key and shape matching. Raises CheckpointError with what differs."""
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"no weights at {path}; expected a folder saved by `pamm train` or `save_pretrained`"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({_first_line(error)}). Pickled weights are not read, because a pickle can run "
            "code: save the model with `save_pretrained`"
        ) from error
    own = model.state_dict()
    missing, foreign = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{key} {list(weights[key].shape)} instead of {list(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if weights[key].shape != own[key].shape
    ]
    if missing or foreign or shapes:
        parts = [("missing", missing), ("unknown", foreign), ("of another shape", sorted(shapes))]
        told = "; ".join(f"{len(keys)} {what}, e.g. {', '.join(keys[:3])}" for what, keys in parts if keys)
        raise CheckpointError(
            f"{path} belongs to another architecture: {told}. Use the {CONFIG_FILE} saved beside the weights, or the recipe "
            "they were trained with"
        )
    model.load_state_dict(weights)


def find_checkpoint(source: Path) -> Path:
    """The folder with weights that `source` means: itself, or the best, else the last, of a run folder."""
    for name in ("best", "last"):
        recover(source / name)
    for folder in (source, source / "best", source / "last"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if source.is_file():
        raise CheckpointError(
            f"{source} is a file; expected a run folder, or a folder with {CONFIG_FILE} and {WEIGHTS_FILE}. Pickled weights "
            "(.pt, .pth, .tar) are not read here, because a pickle can run code"
        )
    raise CheckpointError(
        f"{source} holds no checkpoint: no {CONFIG_FILE} in it, nor in best/ or last/. Train one: pamm train RECIPE --out {source}"
    )


def load_model(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> MultiTaskModel:
    """The saved model in eval mode: from a run folder, a folder saved by `save_pretrained`, or the Hugging Face hub.

    source: a path, or a hub repository "owner/name". Raises CheckpointError, ConfigError.
    """
    path = Path(source).expanduser()
    if path.exists():
        folder = find_checkpoint(path)
    elif str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        folder = _download(str(source), revision, token)
    else:
        raise CheckpointError(f"no run folder, model folder or hub repository '{source}'")
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text())
        model = rebuild_model(settings)
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} does not describe a pamm model: {error}") from error
    load_weights(model, folder / WEIGHTS_FILE)
    return model.eval()


def _download(repository: str, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [CONFIG_FILE, WEIGHTS_FILE]
        return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"'{repository}' is neither a local folder nor a repository that the Hugging Face hub gave ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
