"""From configuration to network: the only place that knows which decoder belongs to which configuration."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pamm import PammError
from pamm.config.experiment import DecoderConfig, ModelConfig, MTMambaConfig, PAMMConfig, ReleasedConfig
from pamm.config.limits import LIMITS, MODEL_LIMITS, check_ranges
from pamm.config.renamed import with_new_names
from pamm.config.strict import ConfigError, from_dict, to_dict
from pamm.files import shown
from pamm.models.backbone import Backbone, NoBackbone, check_size, create_backbone
from pamm.models.formats import FIELD, format_of
from pamm.models.model import MultiTaskModel
from pamm.models.mtmamba import DenseHead, LiteHead, MTMambaDecoder
from pamm.models.pamm import ConvHead, PAMMDecoder
from pamm.models.pamm_released import ReleasedDecoder
from pamm.tasks import Task, create_task

Decoder = tuple[nn.Module, dict[str, nn.Module]]
"""A module, stage maps → task name → features, and the head of every task, features → logits."""

Builder = Callable[[Any, Any, Mapping[str, Task]], Decoder]
"""Settings, backbone and tasks → decoder and heads."""

DECODERS: dict[type[DecoderConfig], Builder] = {}
"""Class of settings → builder of the decoder and heads."""


BackboneBuilder = Callable[[ModelConfig, Mapping[str, Task], tuple[int, int]], Backbone]
"""Settings, tasks and image size (H, W), pixels → backbone."""

BACKBONES: dict[type[DecoderConfig], BackboneBuilder] = {}
"""Class of a decoder's settings → builder of its backbone, where the decoder reads more than the stages' maps."""


def register_decoder(
    settings: type[DecoderConfig], *, backbone: BackboneBuilder | None = None
) -> Callable[[Builder], Builder]:
    """Decorator for a function that builds decoder and heads from settings, backbone and tasks.

    Args:
        settings: class of the decoder's settings.
        backbone: builds the backbone, where the decoder reads more than the maps that `create_backbone`'s hand out.

    Returns:
        The decorator.
    """

    def register(build: Builder) -> Builder:
        DECODERS[settings] = build
        if backbone is not None:
            BACKBONES[settings] = backbone
        return build

    return register


@register_decoder(PAMMConfig)
def pamm(config: PAMMConfig, backbone: Backbone, tasks: Mapping[str, Task]) -> Decoder:
    """PAMM's decoder and heads."""
    require_one_size(backbone)
    decoder = PAMMDecoder(config, backbone.channels, len(backbone.out_indices), list(tasks))
    return decoder, {name: ConvHead(config.width, task.channels) for name, task in tasks.items()}


@register_decoder(ReleasedConfig)
def pamm_released(config: ReleasedConfig, backbone: Backbone, tasks: Mapping[str, Task]) -> Decoder:
    """The decoder and heads of PAMM's published code."""
    require_one_size(backbone)
    decoder = ReleasedDecoder(config, backbone.channels, backbone.grid, len(backbone.out_indices), list(tasks))
    return decoder, {name: ConvHead(config.width, task.channels, bias=True) for name, task in tasks.items()}


@register_decoder(MTMambaConfig)
def mtmamba(config: MTMambaConfig, backbone: Backbone, tasks: Mapping[str, Task]) -> Decoder:
    """MTMamba's or MTMamba++'s decoder and heads."""
    if isinstance(backbone.channels, int):
        raise ConfigError(
            "backbone.name: MTMamba's decoder needs stages of falling resolution, which a Swin transformer gives"
        )
    decoder = MTMambaDecoder(config, backbone.channels, list(tasks))
    channels = backbone.channels[0]
    if config.system == "mtmamba":
        return decoder, {name: DenseHead(channels, task.channels) for name, task in tasks.items()}
    return decoder, {name: LiteHead(channels, config.head_width, task.channels) for name, task in tasks.items()}


def require_one_size(backbone: Backbone) -> None:
    """Raise ConfigError for a backbone whose stages' maps are not of one size."""
    if not isinstance(backbone.channels, int):
        raise ConfigError(
            "backbone.name: this decoder needs stages of one size, which a plain vision transformer gives"
        )


LARGEST_TABLES = 2**30
"""Bytes that a network needs beside its weights, at most; no saved file limits them."""


def build_model(
    config: ModelConfig, tasks: Mapping[str, Task], image_size: tuple[int, int], device: str = "cpu"
) -> MultiTaskModel:
    """Build the configured network, with random weights or the backbone's pretrained ones.

    Args:
        config: its settings.
        tasks: task name → task.
        image_size: (H, W) of the images, pixels.
        device: "cpu", or "meta" for shapes without memory.

    Returns:
        The network; its weights are float32, whatever torch's default dtype is.

    Raises:
        ConfigError: settings that do not fit together, or a network larger than the memory.
    """
    if not tasks:
        raise ConfigError("no tasks: an experiment needs at least one, e.g. tasks: {depth: {weight: 1.0}}")
    check_ranges(to_dict(config), MODEL_LIMITS)
    blocks, most = sum(config.backbone.depths or ()), MODEL_LIMITS["backbone.depth"][1]
    if blocks > most:
        raise ConfigError(f"backbone.depths: found {blocks} blocks, expected at most {most}")
    check_ranges({"image_size": list(image_size)}, {"image_size": LIMITS["data.size"]})
    if device != "meta":
        _check_memory(build_model(_random(config), tasks, image_size, "meta"))
    with _float32(), torch.device(device):
        own = BACKBONES.get(type(config.decoder))
        backbone = own(config, tasks, image_size) if own else create_backbone(config.backbone, image_size)
        decoder, heads = _builder(config.decoder)(config.decoder, backbone, tasks)
    settings = {
        "model": to_dict(config),
        "tasks": {name: task.options() for name, task in tasks.items()},
        "image_size": list(image_size),
    }
    model = MultiTaskModel(backbone, decoder, heads, tasks=tasks, settings=settings)
    if not isinstance(backbone, NoBackbone):
        check_size(image_size, model.stride)
    return model


def _builder(config: DecoderConfig) -> Builder:
    if type(config) not in DECODERS:
        known = ", ".join(kind.__name__ for kind in DECODERS)
        raise ConfigError(
            f"decoder: no builder of a {type(config).__name__}, only of {known}; see `pamm.models.registry.register_decoder`"
        )
    return DECODERS[type(config)]


def _random(config: ModelConfig) -> ModelConfig:
    """The same network without fetched weights."""
    return replace(config, backbone=replace(config.backbone, pretrained=False))


def _check_memory(skeleton: nn.Module) -> None:
    """Raise ConfigError for a network whose weights exceed this machine's memory."""
    needed = sum(4 * weight.numel() for weight in skeleton.state_dict().values())
    tables = sum(buffer.numel() * buffer.element_size() for buffer in skeleton.buffers())
    if tables > LARGEST_TABLES:
        raise ConfigError(
            f"backbone.window_size: the tables of positions inside windows take {tables / 1e9:.0f} GB; choose smaller windows"
        )
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not tell
        return
    if needed > memory:
        raise ConfigError(
            f"the weights of this network take {needed / 1e9:.0f} GB, more than the {memory / 1e9:.0f} GB of memory here; "
            "choose smaller sizes of backbone and decoder"
        )


class WithoutDraws(TorchFunctionMode):
    """Inside, new weights are not drawn: they are about to be loaded, and drawing them takes most of the time of a build.

    A normal draw becomes its mean. Left as they were, the values of fresh memory would keep torch's `trunc_normal_`, which
    draws again until every value lies within its bounds, in an endless loop.
    """

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if function in DRAWS:
            tensor = arguments[0] if arguments else options["tensor"]
            if function is not Tensor.normal_:
                return tensor
            return tensor.fill_(arguments[1] if len(arguments) > 1 else options.get("mean", 0.0))
        return function(*arguments, **options)


DRAWS = {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_}
DRAWS |= {getattr(nn.init, name) for name in ("uniform_", "normal_", "kaiming_uniform_")}


@contextmanager
def _float32() -> Iterator[None]:
    """torch's default dtype is float32 inside."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def rebuild_model(settings: Mapping[str, Any], device: str = "cpu") -> MultiTaskModel:
    """The network that `settings` (a saved model's config.json) describe, without fetching weights. Raises ConfigError."""
    try:
        format_of(settings)
        saved, tasks, (height, width) = settings["model"], settings["tasks"], settings["image_size"]
        config = from_dict(ModelConfig, with_new_names(saved, "model."), "model.")
        if not all(type(side) is int for side in (height, width)):
            raise ConfigError(f"image_size: found {shown(settings['image_size'])}, expected whole numbers of pixels")
        built = {name: create_task(name, **options) for name, options in tasks.items()}
        model = build_model(_random(config), built, (height, width), device)
    except PammError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        raise ConfigError(f"not a pamm model configuration: {type(error).__name__} {shown(error, 200)}") from error
    except ValueError as error:
        raise ConfigError(shown(error, 400)) from error
    model.settings = {key: value for key, value in settings.items() if key != FIELD} | {"model": to_dict(config)}
    return model


for _module in pkgutil.iter_modules([os.path.dirname(__file__)]):
    importlib.import_module(f"pamm.models.{_module.name}")
