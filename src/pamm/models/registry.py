"""From configuration to network: the only place that knows which decoder belongs to which configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pamm.experiment import ModelConfig, MTMambaConfig, PAMMConfig, ReleasedConfig
from pamm.models.backbone import NoBackbone, Swin, ViT, create_backbone
from pamm.models.heads import ConvHead
from pamm.models.model import MultiTaskModel
from pamm.models.mtmamba import DenseHead, LiteHead, MTMambaDecoder
from pamm.models.pamm import PAMMDecoder
from pamm.models.pamm_released import ReleasedDecoder
from pamm.strict import ConfigError, from_dict, to_dict
from pamm.tasks import Task, create_task

Decoder = tuple[nn.Module, dict[str, nn.Module]]


def pamm(config: PAMMConfig, backbone: nn.Module, tasks: Mapping[str, Task]) -> Decoder:
    """PAMM's decoder and heads."""
    _require_vit(backbone)
    decoder = PAMMDecoder(config, backbone.channels, len(backbone.taps), list(tasks))
    return decoder, {name: ConvHead(config.width, task.channels) for name, task in tasks.items()}


def pamm_released(config: ReleasedConfig, backbone: nn.Module, tasks: Mapping[str, Task]) -> Decoder:
    """The decoder and heads of PAMM's published code."""
    _require_vit(backbone)
    decoder = ReleasedDecoder(config, backbone.channels, backbone.grid, len(backbone.taps), list(tasks))
    return decoder, {name: ConvHead(config.width, task.channels, bias=True) for name, task in tasks.items()}


def mtmamba(config: MTMambaConfig, backbone: nn.Module, tasks: Mapping[str, Task]) -> Decoder:
    """MTMamba's or MTMamba++'s decoder and heads."""
    if not isinstance(backbone, (Swin, NoBackbone)):
        raise ConfigError(
            "backbone.name: MTMamba's decoder needs stages of falling resolution, which a Swin transformer gives"
        )
    decoder = MTMambaDecoder(config, backbone.channels, list(tasks))
    channels = backbone.channels[0]
    if config.system == "mtmamba":
        return decoder, {name: DenseHead(channels, task.channels) for name, task in tasks.items()}
    return decoder, {name: LiteHead(channels, config.head_width, task.channels) for name, task in tasks.items()}


def _require_vit(backbone: nn.Module) -> None:
    if not isinstance(backbone, ViT):
        raise ConfigError(
            "backbone.name: PAMM's decoder needs stages of one size, which a plain vision transformer gives"
        )


DECODERS: dict[type, Callable[[Any, nn.Module, Mapping[str, Task]], Decoder]] = {
    PAMMConfig: pamm,
    ReleasedConfig: pamm_released,
    MTMambaConfig: mtmamba,
}
"""Configuration class → builder of the decoder and heads."""


def build_model(config: ModelConfig, tasks: Mapping[str, Task], image_size: tuple[int, int]) -> MultiTaskModel:
    """The configured network for these tasks, with random or the backbone's pretrained weights. Raises ConfigError.

    Its weights are float32 on the CPU, whatever torch's default dtype and device are.
    """
    if not tasks:
        raise ConfigError("no tasks: an experiment needs at least one, e.g. tasks: {depth: {weight: 1.0}}")
    with _float32(), torch.device("cpu"):
        backbone = create_backbone(config.backbone, image_size)
        decoder, heads = DECODERS[type(config.decoder)](config.decoder, backbone, tasks)
    settings = {
        "model": to_dict(config),
        "tasks": {name: task.options() for name, task in tasks.items()},
        "image_size": list(image_size),
    }
    return MultiTaskModel(backbone, decoder, heads, tasks=tasks, settings=settings)


@contextmanager
def _float32() -> Iterator[None]:
    """torch's default dtype is float32 inside."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def rebuild_model(settings: Mapping[str, Any]) -> MultiTaskModel:
    """The network that `settings` (a saved model's config.json) describe, without fetching weights. Raises ConfigError."""
    try:
        saved, tasks, size = settings["model"], settings["tasks"], settings["image_size"]
        config = from_dict(ModelConfig, {**saved, "backbone": {**saved["backbone"], "pretrained": False}})
        built = {name: create_task(name, **options) for name, options in tasks.items()}
        model = build_model(config, built, (int(size[0]), int(size[1])))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"not a pamm model configuration: {type(error).__name__} {error}") from error
    model.settings = dict(settings)
    return model
