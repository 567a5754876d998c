"""A network's prediction: this package's form, its parts, and the plain form with either scan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pamm.build import create_model
from pamm.config.experiment import Experiment, PAMMConfig, ReleasedConfig
from pamm.config.recipes import get_recipe
from pamm.kernels.prepare import prepare
from pamm.models.model import MultiTaskModel
from speed import BenchError
from speed.measure import Candidate, Workload
from speed.plain_pamm import PlainPAMM
from speed.plain_released import PlainReleased
from speed.plain_scan import SCANS

Decode = Callable[[list[Tensor], tuple[int, int]], dict[str, Tensor]]

PLAIN = {"plain, engine": "engine", "plain, recurrence": "recurrence"}
"""Candidate → what the plain form scans with."""


def experiment_of(settings: Mapping[str, Any]) -> Experiment:
    """The recipe at the size asked for, its weights random. Raises ConfigError for an unknown recipe."""
    experiment = get_recipe(settings["recipe"])
    if settings.get("size"):
        experiment = replace(experiment, data=replace(experiment.data, size=tuple(settings["size"])))
    return experiment


def workload(settings: Mapping[str, Any], only: str | None = None) -> Workload:
    """Candidates "pamm", "pamm, compiled", "plain, engine", "plain, recurrence", or the one named.

    settings: recipe, size (H, W) or None, batch, part ("whole" or "decoder": decoder, heads and the resizing of their logits),
    dtype, device, dead_branch, candidates.
    """
    experiment = experiment_of(settings)
    device, decoder_only = settings["device"], settings["part"] == "decoder"
    model = create_model(experiment).to(device).eval()
    names = [only] if only else settings["candidates"]
    own = prepared(model, names, settings["dtype"])
    size = experiment.data.size
    image = torch.randn(settings["batch"], 3, *size, device=device)
    with torch.inference_mode():
        stages = model.backbone(image) if decoder_only else []
    found = {}
    for name in names:
        if name in PLAIN:
            decode = plain_decoder(model, experiment, PLAIN[name], dead_branch=settings["dead_branch"])
            call = decode if decoder_only else with_backbone(model.backbone, decode)
        else:
            call = own.decode if decoder_only else own
        if name.endswith("compiled"):
            call = torch.compile(call)
        work = predicting(call, stages if decoder_only else image, size, settings)
        found[name] = Candidate(work, count_flops="recurrence" not in name and "compiled" not in name)
    if only in PLAIN:
        drop_decoder(model)
    shape = {key: settings[key] for key in ("recipe", "part", "batch", "dead_branch")} | {"size": list(size)}
    return Workload(found, shape | {"tasks": list(model.tasks)}, images=settings["batch"])


def prepared(model: MultiTaskModel, candidates: Collection[str], dtype: str) -> MultiTaskModel:
    """This package's form, ready for inference; a copy where plain forms use the weights as well."""
    if not set(candidates) - set(PLAIN):
        return model
    own = copy.deepcopy(model) if set(candidates) & set(PLAIN) else model
    return prepare(own, precision=dtype)


def plain_decoder(model: MultiTaskModel, experiment: Experiment, scan: str, *, dead_branch: bool = False) -> Decode:
    """The plain form of a network's decoder and heads, on its weights. Raises BenchError for a decoder without one."""
    config = experiment.model.decoder
    if isinstance(config, ReleasedConfig):
        return PlainReleased(model, SCANS[scan], dead_branch=dead_branch)
    if isinstance(config, PAMMConfig):
        return PlainPAMM(model, config, SCANS[scan]).to(next(model.parameters()).device)
    raise BenchError(f"no plain form of '{config.system}' is here; give --plain none")


def drop_decoder(model: MultiTaskModel) -> None:
    """Take the decoder and heads out of a network, so that a plain form's copy of their weights alone stays in memory."""
    model.decoder, model.heads = nn.Identity(), nn.ModuleDict()


def with_backbone(backbone: nn.Module, decode: Decode) -> Callable[[Tensor, tuple[int, int]], dict[str, Tensor]]:
    return lambda image, size: decode(backbone(image), size)


def predicting(call: Callable, given: Any, size: tuple[int, int], settings: Mapping[str, Any]) -> Callable[[], Any]:
    """A prediction without gradients, in the arithmetic asked for."""

    def run() -> dict[str, Tensor]:
        with torch.inference_mode(), arithmetic(settings["device"], settings["dtype"]):
            return call(given, size)

    return run


def arithmetic(device: str, dtype: str) -> AbstractContextManager:
    """float32, or autocast to a narrower type; the plain forms' weights stay float32."""
    return nullcontext() if dtype == "float32" else torch.autocast(device, dtype=getattr(torch, dtype))
