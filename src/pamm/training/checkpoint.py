"""Files of a run: saved whole or not at all, read without running code.

A run folder holds `experiment.yaml`, `log.jsonl`, `last/` (weights, settings, optimizer) and `best/` (weights, settings).
Weights are safetensors; the optimizer's state is read with `weights_only=True` and fits the parameters before it is used.
"""

from __future__ import annotations

import math
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pamm.files import first_line, shown
from pamm.models.formats import CONFIG_FILE, WEIGHTS_FILE, read_format, upgraded_optimizer
from pamm.models.model import MultiTaskModel
from pamm.models.saved import RESTORE, CheckpointError, load_weights, replaced
from pamm.runtime.workers import exhausted

TRAINING_FILE = "training.pt"


def real_place(target: Path) -> Path:
    """The folder behind a symbolic link; `last/` and `best/` may be links, and stay links."""
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def holds_files(folder: Path) -> bool:
    """Whether a folder exists and is not empty: an empty one may be the prepared target of a link."""
    return folder.is_dir() and any(folder.iterdir())


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, then put it in `target`'s place; on any failure the old `target` survives.

    Where `target` is a symbolic link, the folder that it means is replaced, and the link stays. A process killed between the two
    renames leaves `.<target>.old`, which `recover` puts back. Raises CheckpointError.
    """
    target = real_place(target)
    new, old = target.with_name(f".{target.name}.new"), replaced(target)
    recover(target)
    try:
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
        if exhausted(error):  # a data loading process died meanwhile: no fault of the disk
            raise
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
    """Finish a replacement that was cut off, and remove what it left. Only the process that writes may call it."""
    target = real_place(target)
    new, old = target.with_name(f".{target.name}.new"), replaced(target)
    if old.exists() and not target.exists():
        os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)


def save_checkpoint(target: Path, model: MultiTaskModel, training: dict[str, Any] | None = None) -> None:
    """Save weights, settings and, if given, the training state (tensors, numbers, strings, dicts, lists) atomically."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder, model_card_kwargs={"run": target})
        if training is not None:
            torch.save(training, folder / TRAINING_FILE)

    replace_folder(target, write)


def load_training(target: Path, model: MultiTaskModel, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Load weights and optimizer of `target`; returns the saved state, whose keys are those of `state`.

    Nothing of the optimizer is written before all of the saved state is seen to fit its parameters: torch's fused kernels would
    write past a tensor's end. Raises CheckpointError for damaged and foreign files.
    """
    load_weights(model, target / WEIGHTS_FILE)
    path = target / TRAINING_FILE
    try:
        _check_archive(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or "optimizer" not in saved:
            raise ValueError("it holds no state of an optimizer")
        moments = saved.pop("optimizer")
        if "images" in state:  # states of earlier releases lack it
            saved.setdefault("images", state["images"])
        _check_numbers(saved, state)
        own = optimizer.state_dict()
        _check_groups(moments, own["param_groups"])
        moments = upgraded_optimizer(moments, model, optimizer, read_format(target / CONFIG_FILE))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        _check_state(moments["state"], parameters, saved["step"])
        rates = [{"lr": group["lr"]} for group in moments["param_groups"]]
        groups = [mine | rate for mine, rate in zip(own["param_groups"], rates, strict=True)]
        optimizer.load_state_dict({"state": moments["state"], "param_groups": groups})
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise CheckpointError(
            f"{path} is damaged or not a training state of this run ({shown(first_line(error), 200)}). {RESTORE}"
        ) from error
    return saved


def _check_archive(path: Path) -> None:
    """Raise ValueError for a file whose content would take more memory than the file has bytes."""
    with zipfile.ZipFile(path) as archive:
        packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed or sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("it holds compressed or overlapping records, which torch.save does not write")


def _check_numbers(saved: dict[str, Any], state: Mapping[str, Any]) -> None:
    """Raise ValueError unless `saved` has the keys and types of `state`, and steps in an order that a run has."""
    if {key: type(value) for key, value in saved.items()} != {key: type(value) for key, value in state.items()}:
        raise ValueError(f"it holds {', '.join(map(str, saved))} instead of {', '.join(state)}")
    step, later = saved["step"], [saved["evaluated"], saved["best_step"]]
    if step < 0 or saved.get("images", 0) < 0 or not all(0 <= s <= step for s in later) or math.isnan(saved["best"]):
        raise ValueError(f"its steps and best loss are {saved}")


def _check_groups(moments: Any, own: list[dict[str, Any]]) -> None:
    """Raise ValueError unless the saved parameter groups are the optimizer's own, but for the learning rate.

    A setting that this release of torch does not write into groups, or that the writing one did not, is no difference.
    """
    if not isinstance(moments, dict) or set(moments) != {"state", "param_groups"}:
        raise ValueError("its optimizer has no state and parameter groups")
    groups = moments["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own) or not all(isinstance(g, dict) for g in groups):
        raise ValueError(f"its optimizer has other parameter groups than this run's {len(own)}")
    for number, (found, wanted) in enumerate(zip(groups, own, strict=True)):
        for key in ("params", "weight_decay", "betas", "eps", *sorted(set(found) & set(wanted) - {"lr"})):
            if key not in found or type(found[key]) is not type(wanted[key]) or found[key] != wanted[key]:
                raise ValueError(f"parameter group {number}: {key} is {found.get(key)}, expected {wanted[key]}")
        if type(found.get("lr")) is not float or not 0 <= found["lr"] < math.inf:
            raise ValueError(f"parameter group {number}: lr is {found.get('lr')}, expected a number of 0 or more")


def _check_state(state: Any, parameters: list[Tensor], step: int) -> None:
    """Raise ValueError unless every parameter has moments of its shape and type, after `step` steps."""
    if not isinstance(state, dict) or set(state) != set(range(len(parameters)) if step else ()):
        raise ValueError(f"its optimizer has not one state for each of {len(parameters)} parameters")
    for index, parameter in enumerate(parameters if step else ()):
        own, name = state[index], f"the optimizer's state of parameter {index}"
        if not isinstance(own, dict) or set(own) != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"{name} is not step, exp_avg and exp_avg_sq")
        _check_tensor(f"{name}, step,", own["step"], torch.Size(()), torch.float32)
        if float(own["step"]) != step:
            raise ValueError(f"{name} is of step {float(own['step']):g}, the run's is {step}")
        for key in ("exp_avg", "exp_avg_sq"):
            _check_tensor(f"{name}, {key},", own[key], parameter.shape, parameter.dtype)
            if not own[key].isfinite().all():
                raise ValueError(f"{name}, {key}, holds numbers that are not finite")
        if (own["exp_avg_sq"] < 0).any():
            raise ValueError(f"{name}, exp_avg_sq, holds negative numbers")


def _check_tensor(name: str, value: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raise ValueError for anything but a plain tensor whose every element has a place of its own."""
    if type(value) is not Tensor or value.layout is not torch.strided or value.device.type != "cpu":
        raise ValueError(f"{name} is no plain tensor")
    if value.shape != shape or value.dtype is not dtype:
        raise ValueError(f"{name} is {list(value.shape)} {value.dtype}, expected {list(shape)} {dtype}")
    room = sorted((stride, size) for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1)
    reach = 1
    for stride, size in room:
        if stride < reach:
            raise ValueError(f"{name} has elements that share a place in memory")
        reach = stride * (size - 1) + reach
    if value.is_conj() or value.is_neg():
        raise ValueError(f"{name} is no plain tensor")
