"""Published checkpoints: their tensors, under their names, become a network of this package that gives their outputs.

    model = pamm.official.load("checkpoint.pth.tar", image_size=(512, 512))
    print(model.load_report)

Every published system is one module of this package with `SYSTEM` (its name), `matches(state) -> bool` and
`read(state, **options) -> MultiTaskModel`; a new one is found without being listed anywhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from pamm.files import shown
from pamm.models.model import MultiTaskModel
from pamm.official.facts import Facts
from pamm.official.files import read_state
from pamm.official.names import LoadReport, OfficialError, Place

_MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]

SYSTEMS: dict[str, ModuleType] = {module.SYSTEM: module for module in _MODULES if hasattr(module, "SYSTEM")}
"""Published system → the module that reads its checkpoints."""


def load(
    state_dict_or_path: Mapping[str, Tensor] | str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    scan: str | None = None,
    extras: Mapping[str, Tensor] | None = None,
    checkpoint_size: tuple[int, int] | None = None,
    facts: Mapping[str, Any] | None = None,
    published: str | None = None,
) -> MultiTaskModel:
    """Load a published checkpoint as a network in eval mode.

    Keys and shapes determine the system, its tasks, channels, widths, depths, state size, experts and stages. The arguments give
    the rest.

    Args:
        state_dict_or_path: tensors by name; a whole checkpoint with them under "model" or "state_dict"; or a file of either
            (`torch.save` or safetensors; no code in a file is executed). Prefixes of wrappers (`module.`, `model.`,
            `_orig_mod.`) are removed.
        image_size: (H, W) of the network's images, pixels; default the checkpoint's own, if it is square.
        num_heads: attention heads of a vision transformer; default its width / 64.
        scan: PAMM's scan orders, those of its published code: "hilbert" (default), "snake" or "morton", there called h, s and
            z.
        extras: tensors that existed in training and are missing from the checkpoint, under the checkpoint's names (released
            PAMM: A_log0, D0, task_prompt_B, task_prompt_C; default −(1..N), 1, 0, 0).
        checkpoint_size: (H, W) of the training images, if it differs from `image_size` and the checkpoint does not show it;
            default the grid of tokens with the nearest proportions.
        facts: properties of MLoRE, InvPT and TaskPrompter that neither keys nor shapes show, by name, e.g. {"num_heads": 16,
            "topk": 9}. `SYSTEMS[name].FACTS` lists them with their meaning and their source.
        published: data set whose published configuration gives the missing facts: "pascal", "nyud" or "cityscapes".

    Returns:
        The network, with its `load_report`.

    Raises:
        OfficialError: not a readable checkpoint of a known system; a missing or unknown key, or one of another shape; an
            argument that does not fit.
    """
    state = read_state(state_dict_or_path)
    options = {"image_size": image_size, "num_heads": num_heads, "scan": scan, "extras": extras}
    options["checkpoint_size"] = checkpoint_size
    given = {name: value for name, value in options.items() if value is not None}
    for module in SYSTEMS.values():
        if module.matches(state):
            return module.read(state, **_arguments(module, given, dict(facts or {}), published)).eval()
    raise OfficialError(
        f"these {len(state)} tensors are of no published system known here ({', '.join(SYSTEMS)}); they begin with "
        f"{shown(', '.join(list(state)[:3]), 200) or 'nothing'}. A network of this package loads with pamm.load_model"
    )


def _arguments(
    module: ModuleType, given: dict[str, Any], facts: dict[str, Any], published: str | None
) -> dict[str, Any]:
    """What the system's `read` takes. Raises OfficialError for an argument that is not of this system."""
    if hasattr(module, "FACTS"):
        for name in ("scan", "extras"):
            if given.pop(name, None):
                raise OfficialError(f"{name}: found for a checkpoint of {module.SYSTEM}, which has none; leave it out")
        if "num_heads" in given:
            facts.setdefault("num_heads", given.pop("num_heads"))
        return given | {"facts": Facts(module.SYSTEM, module.FACTS, facts, module.PUBLISHED, published)}
    if published is not None:
        raise OfficialError(
            f"published: found '{shown(published)}' for a checkpoint of {module.SYSTEM}, which needs none"
        )
    for name in facts:
        if name not in ("num_heads", "scan"):
            raise OfficialError(
                f"facts: found '{shown(name)}' for a checkpoint of {module.SYSTEM}, expected num_heads or scan"
            )
    return given | facts


@contextmanager
def intermediates(model: MultiTaskModel) -> Iterator[dict[str, Tensor]]:
    """Context manager for the intermediate results of the last forward pass inside it.

        with intermediates(model) as maps:
            model(image)
        maps["B.0.semseg"]

    Args:
        model: a network made by `load`.

    Yields:
        Name → tensor. The decoder's `observe` lists names and shapes, e.g. `ReleasedDecoder.observe`.

    Raises:
        OfficialError: the decoder has no `observe`.
    """
    maps: dict[str, Tensor] = {}
    observe: Any = getattr(model.decoder, "observe", None)
    if observe is None:
        raise OfficialError(f"a {type(model.decoder).__name__} has no intermediate results to read")
    handles = observe(maps)
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def gradients(model: MultiTaskModel) -> dict[str, Tensor | None]:
    """The gradient of every tensor of the checkpoint, after a backward pass.

    Call `requires_grad_()` on the buffers of constants (`extras`) before the forward pass to get their gradients, too.

    Args:
        model: a network made by `load`.

    Returns:
        Their key → gradient in their shape, or in the new shape if the tensor was resized for another image size. None where no
        gradient flows: tensors that the network does not use, BatchNorm's statistics, and constants.

    Raises:
        OfficialError: the model has no `load_report`.
    """
    report: LoadReport | None = getattr(model, "load_report", None)
    if report is None:
        raise OfficialError("the checkpoint's names are not known: this model was not made by pamm.official.load")
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    gradient = {name: tensor.grad for name, tensor in own.items()}
    found = {key: place.collect(gradient) for key, place in report.used.items()}
    return found | dict.fromkeys(report.ignored)


__all__ = ["SYSTEMS", "LoadReport", "OfficialError", "Place", "gradients", "intermediates", "load"]
