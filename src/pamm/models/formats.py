"""Changes of the format of saved models: an older file's tensors become those of today's network.

config.json holds the number of the format, "format"; where it holds none, the format is 1.

    1   weights of `TaskLinear` are (T, in, out)
    2   they are (T, out, in), as torch's
    3   settings have the names of today (see `pamm.config.renamed`)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pamm import PammError
from pamm.nn.task_layers import TaskLinear

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

FORMAT = 3
FIELD = "format"
"""Its key in config.json."""


class FormatError(PammError, ValueError):
    """A format that this version does not read; the message gives the remedy."""


def format_of(settings: Mapping[str, Any]) -> int:
    """The format that a saved model's settings state. Raises FormatError for one that is not known here."""
    found = settings.get(FIELD, 1)
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise FormatError(
            f"{FIELD}: found {found!r}, this version reads 1 to {FORMAT}; a newer pamm wrote the model: upgrade pamm"
        )
    return found


def read_format(config: Path) -> int:
    """As `format_of`, of a config.json; a file that is absent or no JSON object states none, and its format is 1."""
    try:
        settings = json.loads(config.read_text())
    except (OSError, ValueError):
        return 1
    return format_of(settings) if isinstance(settings, dict) else 1


def upgraded_weights(weights: Mapping[str, Tensor], model: nn.Module, written: int) -> dict[str, Tensor]:
    """Tensors of a file of format `written`, by their plain names → as the model's state dict has them."""
    if written > 1:
        return dict(weights)
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, TaskLinear)}
    return {
        key: tensor.mT.contiguous() if key in turned and tensor.dim() == 3 else tensor
        for key, tensor in weights.items()
    }


def upgraded_optimizer(state: dict[str, Any], model: nn.Module, optimizer: Any, written: int) -> dict[str, Any]:
    """The state dict of an optimizer saved beside a model of format `written`, as `optimizer` of today's model loads it."""
    if written > 1:
        return state
    turned = {id(module.weight) for module in model.modules() if isinstance(module, TaskLinear)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    kept = dict(state["state"])
    for number, parameter in zip(numbers, parameters, strict=True):
        if id(parameter) in turned and number in kept:
            kept[number] = {
                key: value.mT.contiguous() if isinstance(value, Tensor) and value.dim() == 3 else value
                for key, value in kept[number].items()
            }
    return {**state, "state": kept}
