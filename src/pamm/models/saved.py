"""Saved models: safetensors and settings in a folder or on the Hugging Face hub, read strictly and without running code."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from pamm.models.model import CONFIG_FILE, WEIGHTS_FILE, MultiTaskModel
from pamm.models.registry import rebuild_model
from pamm.strict import ConfigError


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names the file, the cause and the remedy."""


def load_weights(model: MultiTaskModel, path: Path) -> None:
    """Load a safetensors file into the model, every key and shape matching. Raises CheckpointError with what differs."""
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"no weights at {path}; expected a folder saved by `pamm train` or `save_pretrained`. {RESTORE}"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({first_line(error)}). {RESTORE}. Pickled weights are not read, because a "
            "pickle can run code: save the model with `save_pretrained`"
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
    """The folder with weights that `source` means: itself, or the best, else the last, of a run folder.

    A run killed while it replaced a folder has it under the name `.<folder>.old`.
    """
    for folder in (source, *(source / name for name in ("best", ".best.old", "last", ".last.old"))):
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

    source: a path, or a hub repository "owner/name". Raises CheckpointError.
    """
    path = Path(source).expanduser()
    if path.exists():
        folder = find_checkpoint(path)
    elif str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        folder = _download(str(source), revision, token)
    else:
        raise CheckpointError(f"no run folder, model folder or hub repository '{source}'; check the path")
    try:
        model = rebuild_model(json.loads((folder / CONFIG_FILE).read_text()))
    except (ValueError, OSError, ConfigError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} does not describe a pamm model: {error}. Restore it from a copy, or save the model again "
            "with `save_pretrained`"
        ) from error
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
            f"'{repository}' is neither a local folder nor a repository that the Hugging Face hub gave "
            f"({first_line(error)}). Check the name and the network"
        ) from error


RESTORE = "Restore it from a copy, or train into another folder (--out)"


def first_line(error: BaseException) -> str:
    """An error's message without what follows its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
