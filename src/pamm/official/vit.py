"""What the published systems on a vision transformer share: its layout, its facts, and the network from a table of names."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from pamm.config.experiment import BackboneConfig, ModelConfig
from pamm.config.strict import ConfigError
from pamm.models.model import MultiTaskModel
from pamm.models.registry import build_model
from pamm.nn.router import resize_positions
from pamm.official.facts import Fact, Facts
from pamm.official.names import LoadReport, OfficialError, Place, count_parameters, gather, match_keys
from pamm.official.tasks import task_order, tasks_of
from pamm.tasks import Task

VIT = "vit_large_patch16_384.augreg_in21k_ft_in1k"
"""The timm model whose kind the backbone is; its sizes are the checkpoint's."""

HEAD_WIDTH = 64
"""Channels of an attention head in every published vision transformer."""

VIT_FACTS = {
    "num_heads": Fact(
        int,
        "attention heads of the vision transformer",
        "the training's yml file names a timm model, which has it; width / 64 in all",
    ),
    "taps": Fact(
        tuple, "blocks, counted from 1, after which the stages are taken", "the published code of the backbone"
    ),
}
"""Facts of every system on a vision transformer."""

ROUTER = (
    ("channel.0.{w}", "0.conv1.{w}"),
    ("channel.1.{w}", "0.ln.{w}"),
    ("channel_out.{w}", "0.conv3.{w}"),
    ("positions", "0.convsp.weight"),
    ("positions_bias", "0.convsp.bias"),
    ("spatial.0.{w}", "0.ln_sp.{w}"),
    ("spatial.2.{w}", "0.conv2.{w}"),
    ("scores.{w}", "1.{w}"),
)
"""Our name and theirs of a `SpatialRouter`'s tensors."""

CLASS_ROW = "backbone.pos_embed: its first row, a class token's, is not used"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ViTLayout:
    """Properties of the vision transformer from shapes."""

    embed_dim: int
    depth: int
    mlp: int
    patch_size: int
    tokens: int
    """Positions of the grid the checkpoint was trained on."""


def inspect_vit(state: Mapping[str, Tensor], system: str) -> ViTLayout:
    """Read the shapes of `backbone.*`. Raises OfficialError for a tensor that is missing."""
    embed_dim, _, patch_size, _ = shape_of(state, "backbone.patch_embed.proj.weight", 4, system)
    return ViTLayout(
        embed_dim=embed_dim,
        depth=len(numbers_of(state, r"backbone\.blocks\.(\d+)\..+")),
        mlp=shape_of(state, "backbone.blocks.0.mlp.fc1.weight", 2, system)[0],
        patch_size=patch_size,
        tokens=shape_of(state, "backbone.pos_embed", 3, system)[1] - 1,
    )


def vit_config(
    layout: ViTLayout, facts: Facts, stages: int, *, class_token: bool, heads: int | None = None
) -> BackboneConfig:
    """The vision transformer; `heads` if shapes show its attention heads. Raises OfficialError."""
    facts.told(embed_dim=layout.embed_dim, depth=layout.depth)
    if heads:
        facts.told(num_heads=heads)
    whole = layout.embed_dim // HEAD_WIDTH if layout.embed_dim % HEAD_WIDTH == 0 else None
    num_heads = heads or facts.need("num_heads", whole, f"one per {HEAD_WIDTH} channels, as in all published ones")
    if num_heads < 1 or layout.embed_dim % num_heads:
        raise OfficialError(f"num_heads: found {num_heads}, expected a divisor of the width, {layout.embed_dim}")
    if layout.depth < stages:
        raise OfficialError(
            f"{layout.depth} blocks of the vision transformer, expected at least one per stage, {stages}"
        )
    even = tuple(layout.depth * (s + 1) // stages for s in range(stages))
    taps = facts.need("taps", even, "evenly spaced, as in all published ones")
    if len(taps) != stages or list(taps) != sorted(set(taps)) or taps[0] < 1 or taps[-1] != layout.depth:
        raise OfficialError(
            f"taps: found {list(taps)}, expected {stages} increasing numbers up to {layout.depth}, the last"
        )
    return BackboneConfig(
        name=VIT,
        pretrained=False,
        out_indices=tuple(tap - 1 for tap in taps),
        patch_size=layout.patch_size,
        embed_dim=layout.embed_dim,
        depth=layout.depth,
        num_heads=num_heads,
        mlp_ratio=layout.mlp / layout.embed_dim,
        class_token=class_token,
    )


def head_channels(state: Mapping[str, Tensor], system: str) -> dict[str, int]:
    """Task → output channels, in the benchmarks' order, from `heads.<task>.linear_pred`."""
    tasks = task_order(numbers_of(state, r"heads\.([^.]+)\.linear_pred\.weight"))
    return {task: shape_of(state, f"heads.{task}.linear_pred.weight", 4, system)[0] for task in tasks}


def read_vit(
    state: Mapping[str, Tensor],
    facts: Facts,
    config: ModelConfig,
    tokens: int,
    table: Callable[[Mapping[str, Tensor], list[str]], dict[str, Place]],
    *,
    unused: Mapping[str, str],
    sizes: Mapping[str, tuple[int, int] | None],
    notices: list[str],
    change: Callable[..., dict[str, Tensor]] | None = None,
) -> MultiTaskModel:
    """The network of `config` with the checkpoint's numbers, and its report. Raises OfficialError.

    Args:
        tokens: positions of the grid the checkpoint was trained on.
        table: our tensors and the tasks' names → their key's place.
        unused: pattern of keys that the network has no use for → why.
        sizes: image_size and checkpoint_size, (H, W), as given to `load`.
        notices: notices of the report besides the facts.
        change: brings their tensors from the checkpoint's grid to the network's; default `on_grid`.
    """
    patch_size = config.backbone.patch_size
    assert patch_size is not None  # a checkpoint tells it
    report = LoadReport(facts.system, notices=[*notices, *facts.notices])
    at = sizes.get("checkpoint_size") or (facts.image if fits(facts.image, patch_size, tokens) else None)
    told = len(report.notices)
    old, new = grids(tokens, patch_size, sizes.get("image_size"), at, report.notices)
    for notice in report.notices[told:]:
        log.warning(notice)
    size = (new[0] * patch_size, new[1] * patch_size)
    return finish(report, state, config, size, table, unused, lambda used: (change or on_grid)(state, used, old, new))


def finish(
    report: LoadReport,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    image_size: tuple[int, int],
    table: Callable[[Mapping[str, Tensor], list[str]], dict[str, Place]],
    unused: Mapping[str, str],
    changed: Callable[[Mapping[str, Place]], Mapping[str, Tensor]],
) -> MultiTaskModel:
    """The network of `config` with the checkpoint's numbers as `changed` gives them, and its report. Raises OfficialError."""
    tasks = tasks_of(head_channels(state, report.system), report.notices)
    model = build(config, tasks, image_size)
    own = model.state_dict()
    check_numbers(own, state)
    names = table(own, list(tasks))
    report.used, report.ignored, report.missed = match_keys(state, names, {}, unused)
    report.parameters = count_parameters(state, [*report.used, *report.ignored])
    model.load_state_dict(gather(own, report.used, changed(report.used), {}), assign=True)
    model.load_report = report
    return model


def fits(image: tuple[int, int] | None, patch_size: int, tokens: int) -> bool:
    """Whether an image of this size has so many tokens."""
    return image is not None and (image[0] // patch_size) * (image[1] // patch_size) == tokens


def build(config: ModelConfig, tasks: Mapping[str, Task], image_size: tuple[int, int], device: str = "meta") -> Any:
    """The network, without memory unless `device` has some. Raises OfficialError for shapes that none has."""
    try:
        return build_model(config, tasks, image_size, device)
    except (ConfigError, ValueError) as error:
        raise OfficialError(
            f"no network has these shapes at {image_size[0]}×{image_size[1]} pixels: {error}"
        ) from error


def check_numbers(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise OfficialError where the network would take far more memory than the checkpoint: its shapes do not fit together."""
    numbers, given = (sum(tensor.numel() for tensor in tensors.values()) for tensors in (own, state))
    if numbers > 8 * given:
        raise OfficialError(
            f"the network of these shapes has {numbers} numbers, the checkpoint {given}: shapes that do not belong together; use "
            "the file as its authors published it"
        )


def numbers_of(state: Mapping[str, Tensor], pattern: str) -> set[str]:
    """The different values of the pattern's group among the keys."""
    return {match[1] for match in (re.fullmatch(pattern, key) for key in state) if match}


def shape_of(state: Mapping[str, Tensor], key: str, dimensions: int | None, system: str) -> tuple[int, ...]:
    """Shape of a tensor that must be there, with so many dimensions. Raises OfficialError."""
    if key not in state:
        raise OfficialError(
            f"not a whole checkpoint of {system}: 1 missing, e.g. {key}; use the file as its authors published it"
        )
    shape = tuple(state[key].shape)
    if not shape or 0 in shape or (dimensions is not None and len(shape) != dimensions):
        raise OfficialError(
            f"{key}: found shape {shape}, expected {dimensions or 'at least 1'} dimensions, none of length 0"
        )
    return shape


def grids(
    tokens: int,
    patch_size: int,
    image_size: tuple[int, int] | None,
    checkpoint_size: tuple[int, int] | None,
    notices: list[str],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of tokens: the checkpoint's, and the network's. Raises OfficialError where neither is determined."""
    new, old = (size and grid_of(size, patch_size) for size in (image_size, checkpoint_size))
    if old is not None and old[0] * old[1] != tokens:
        raise OfficialError(f"checkpoint_size: {old[0]}×{old[1]} tokens, but the checkpoint has {tokens}")
    side = math.isqrt(tokens)
    if old is None and new is None:
        if side * side != tokens:
            raise OfficialError(
                f"image_size: the checkpoint has {tokens} positions, which are no square; give image_size=(H, W)"
            )
        old = (side, side)
    if old is None and new is not None and new[0] * new[1] == tokens:
        old = new
    if old is None:
        assert new is not None
        height, width = new
        short = [rows for rows in range(1, side + 1) if tokens % rows == 0]
        pairs = [
            (rows, tokens // rows) for rows in dict.fromkeys([*short, *(tokens // rows for rows in reversed(short))])
        ]
        old = min(pairs, key=lambda pair: abs(math.log(pair[0] * width / (pair[1] * height))))
        notices.append(
            f"the checkpoint's {tokens} positions taken as {old[0]}×{old[1]} (give checkpoint_size where that is wrong)"
        )
    new = new or old
    if new != old:
        notices.append(
            f"position embeddings (bicubic) and weights of positions (bilinear) resized from {old[0]}×{old[1]} to "
            f"{new[0]}×{new[1]} tokens: the outputs are not those of the checkpoint's own size"
        )
    return old, new


def grid_of(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of tokens of an image size, pixels. Raises OfficialError."""
    height, width = size
    if height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise OfficialError(f"image size: found {height}×{width}, expected multiples of the patch, {patch_size}")
    return height // patch_size, width // patch_size


def on_grid(
    state: Mapping[str, Tensor], used: Mapping[str, Place], old: tuple[int, int], new: tuple[int, int]
) -> dict[str, Tensor]:
    """Their tensors; those of the grid of tokens are resized from `old` to `new` rows and columns."""
    found = dict(state)
    for key, place in used.items():
        if place.own.endswith(".positions") and found[key].numel() == old[0] * old[1]:
            found[key] = resize_positions(found[key].float().view(old), new)
        elif place.own.endswith(".pos_embed") and old != new:
            found[key] = resample_abs_pos_embed(found[key], list(new), list(old), num_prefix_tokens=1)
    return found
