"""Files of a run: saved whole or not at all, read without running code.

A run folder holds `experiment.yaml`, `log.jsonl`, `last/` (weights, settings, optimizer) and `best/` (weights, settings).
Weights are safetensors; the optimizer's state is read with `weights_only=True`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pamm.models.model import WEIGHTS_FILE, MultiTaskModel
from pamm.models.saved import RESTORE, CheckpointError, first_line, load_weights

TRAINING_FILE = "training.pt"


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, then put it in `target`'s place; on any failure the old `target` survives.

    A process killed between the two renames leaves `.<target>.old`, which `recover` puts back. Raises CheckpointError.
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
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        recover(target)
        kept = (
            f"the checkpoint saved before it, {target}, is intact" if target.exists() else "nothing was saved before it"
        )
        free = shutil.disk_usage(target.parent).free / 1e6 if target.parent.exists() else 0
        raise CheckpointError(
            f"could not save {target} ({first_line(error)}); {free:.0f} MB are free there; {kept}. Free some space and run "
            "again: training goes on from the last checkpoint"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Finish a replacement that was cut off between its two renames. Only the process that writes may call it."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(target: Path, model: MultiTaskModel, training: dict[str, Any] | None = None) -> None:
    """Save weights, settings and, if given, the training state (tensors, numbers, strings, dicts, lists) atomically."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder, model_card_kwargs={"run": target})
        if training is not None:
            torch.save(training, folder / TRAINING_FILE)

    replace_folder(target, write)


def load_training(target: Path, model: MultiTaskModel, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Load weights and optimizer of `target`; returns the saved state, whose keys are those of `state`.

    Raises CheckpointError for damaged and foreign files.
    """
    load_weights(model, target / WEIGHTS_FILE)
    path = target / TRAINING_FILE
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved.pop("optimizer"))
        if {key: type(value) for key, value in saved.items()} != {key: type(value) for key, value in state.items()}:
            raise ValueError(f"it holds {', '.join(map(str, saved))} instead of {', '.join(state)}")
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise CheckpointError(f"{path} is damaged or not a training state ({first_line(error)}). {RESTORE}") from error
    return saved
