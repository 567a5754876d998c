"""Checkpoints of the released PAMM (`backbone.stage_MTLoRA_mamba.*`)."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from pamm.config.experiment import BackboneConfig, ExpertsConfig, ModelConfig, ReleasedConfig
from pamm.models.model import MultiTaskModel
from pamm.models.pamm_released import resize_positions
from pamm.models.registry import build_model
from pamm.nn.ssm import init_A_log
from pamm.official.files import named_tensors
from pamm.official.names import LoadReport, OfficialError, Place, count_parameters, gather, match_keys, places
from pamm.official.tasks import task_order, tasks_of

SYSTEM = "pamm-released"

STAGE = "backbone.stage_MTLoRA_mamba"

TOP_K = 9
"""Experts kept; the published code leaves its own setting unused here."""

SCANS = {"h": "hilbert", "s": "snake", "z": "morton"}
"""The published code's letters."""

_ROUTER = (
    ("channel.0.{w}", "0.conv1.{w}"),
    ("channel.1.{w}", "0.ln.{w}"),
    ("channel_out.{w}", "0.conv3.{w}"),
    ("positions", "0.convsp.weight"),
    ("positions_bias", "0.convsp.bias"),
    ("spatial.0.{w}", "0.ln_sp.{w}"),
    ("spatial.2.{w}", "0.conv2.{w}"),
    ("scores.{w}", "1.{w}"),
)
_EXPERTS = (
    *((f"routers.{{t}}.{ours}", f"router.{{t}}.{theirs}") for ours, theirs in _ROUTER),
    ("norm.{t}.{w}", "Bn.{t}.{w}"),
    ("norm_experts.{t}.{w}", "Bn_all.{t}.{w}"),
    ("task_reduce.{t}.{w}", "proj_task.{t}.W.{w}"),
    ("task_restore.{t}.{w}", "proj_task.{t}.M.{w}"),
    ("general.{w}", "proj_gerneral.{w}"),
    ("reduce[k]", "MoE.{k}.W.weight"),
    ("reduce_bias[k]", "MoE.{k}.W.bias"),
    ("restore[k]", "MoE.{k}.M.weight"),
    ("restore_bias[k]", "MoE.{k}.M.bias"),
    ("project.{t}.{w}", "{t}.{w}"),
)
_STAGE = (
    ("shared.{w}", "first_decode.{w}"),
    ("shared_norm.{w}", "input_norm.{w}"),
    ("conv.{t}.{w}", "task_conv.{t}.{w}"),
    ("norm.{t}.{w}", "task_input_norm0.{t}.{w}"),
    ("gate.{t}.{w}", "proj_z0.{t}.{w}"),
    ("expand.{t}.{w}", "dim_expand_proj_x0.{t}.{w}"),
    ("delta_reduce.{t}.{w}", "x2dt_proj0.{t}.{w}"),
    ("delta_restore.{t}.{w}", "dt_proj0.{t}.{w}"),
    ("contract.{t}.{w}", "dim_decrease_proj0.{t}.{w}"),
    *((f"{{p}}.{ours}", f"{{p}}_proj0.{theirs}") for ours, theirs in _EXPERTS),
    ("{p}.prior[t]", "task_prompt_{p}.{t}"),
    ("A_log[t]", "A_log0.{t}"),
    ("D[t]", "D0.{t}"),
)
RULES = (
    ("backbone.vit.{w}", "backbone.{w}"),
    *((f"decoder.stages.{{s}}.{ours}", f"{STAGE}.{{s}}.{theirs}") for ours, theirs in _STAGE),
    ("decoder.fuse.{t}.{w}", "backbone.task_mask.{t}.{w}"),
    ("heads.{t}.conv.{w}", "heads.{t}.mt_proj.0.{w}"),
    ("heads.{t}.norm.{w}", "heads.{t}.mt_proj.1.{w}"),
    ("heads.{t}.predict.{w}", "heads.{t}.linear_pred.{w}"),
)
"""Our name and theirs, see `pamm.official.names`."""

UNUSED = {rf"{re.escape(STAGE)}\.\d+\.conv2d0\..+": "a branch whose output the published code throws away"}
"""Pattern of their keys → why the network needs none of them."""

CONSTANTS = {"A_log": "log(1..N) taken, A = −(1..N)", "D": "1 taken", "prior": "0 taken"}
"""Last part of our constants' names → what stands in for those that the checkpoint does not hold."""

VIT = "vit_large_patch16_384.augreg_in21k_ft_in1k"
"""The timm model whose kind the backbone is; its sizes are the checkpoint's."""

HEAD_WIDTH = 64
"""Channels of an attention head in every published vision transformer."""

log = logging.getLogger(__name__)


def table(own: Mapping[str, Tensor], tasks: list[str]) -> dict[str, Place]:
    """Their key → its place in a network with these tensors, one to one. A pure function of our names and shapes."""
    found = places(own, tasks, RULES)
    # Their position embeddings begin with a row for a class token, which their sequence does not hold.
    found["backbone.pos_embed"] = replace(found["backbone.pos_embed"], skip=1)
    return found


@dataclass(frozen=True)
class Layout:
    """Properties of a released PAMM from keys and shapes."""

    channels: dict[str, int]
    """Task → output channels, in the benchmarks' order."""
    patch_size: int
    embed_dim: int
    """Channels of the vision transformer."""
    depth: int
    mlp: int
    """Hidden channels of its blocks."""
    tokens: int
    """Positions of the grid the checkpoint was trained on."""
    stages: int
    decoder: ReleasedConfig


def inspect(state: Mapping[str, Tensor]) -> Layout:
    """Read keys and shapes. Raises OfficialError for a tensor without which the network is not determined."""
    tasks = task_order(numbers_of(state, r"heads\.([^.]+)\.linear_pred\.weight"))
    embed_dim, _, patch_size, _ = shape_of(state, "backbone.patch_embed.proj.weight", 4)
    return Layout(
        channels={task: shape_of(state, f"heads.{task}.linear_pred.weight", 4)[0] for task in tasks},
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=len(numbers_of(state, r"backbone\.blocks\.(\d+)\..+")),
        mlp=shape_of(state, "backbone.blocks.0.mlp.fc1.weight", 2)[0],
        tokens=shape_of(state, "backbone.pos_embed", 3)[1] - 1,
        stages=len(numbers_of(state, rf"{re.escape(STAGE)}\.(\d+)\..+")),
        decoder=inspect_decoder(state, tasks[0]),
    )


def inspect_decoder(state: Mapping[str, Tensor], task: str) -> ReleasedConfig:
    """The decoder's settings, from the first stage and one of its tasks."""
    first = f"{STAGE}.0"
    width = shape_of(state, f"{first}.first_decode.weight", 4)[0]
    expanded = shape_of(state, f"{first}.dim_expand_proj_x0.{task}.weight", 4)[0]
    if expanded % width:
        raise OfficialError(f"{first}.dim_expand_proj_x0: found {expanded} channels, expected a multiple of {width}")
    has = {p: any(key.startswith(f"{first}.{p}_proj0.MoE.") for key in state) for p in "BC"}
    experts, kernel = ExpertsConfig(B=has["B"], C=has["C"]), ReleasedConfig.kernel_size
    for p in (p for p in "BC" if has[p]):
        rank, _, kernel, _ = shape_of(state, f"{first}.{p}_proj0.MoE.0.W.weight", 4)
        count = len(numbers_of(state, rf"{re.escape(first)}\.{p}_proj0\.MoE\.(\d+)\..+"))
        experts = replace(experts, count=count, rank=rank, top_k=min(TOP_K, count))
    plain = next((f"{first}.{p}_proj0.{task}" for p in "BC" if not has[p]), None)
    rank_delta = shape_of(state, f"{first}.x2dt_proj0.{task}.weight", 2)[0]
    size_key = f"{first}.B_proj0.Bn.{task}.weight" if has["B"] else f"{plain}.weight"
    return ReleasedConfig(
        width=width,
        expand=expanded // width,
        delta_rank=rank_delta if rank_delta != math.ceil(width / 16) else None,
        state_size=shape_of(state, size_key)[0],
        shared_bias=f"{first}.first_decode.bias" in state,
        task_conv=any(key.startswith(f"{first}.task_conv.") for key in state),
        experts=experts,
        kernel_size=kernel,
        projection_bias=f"{plain}.bias" in state,
    )


def numbers_of(state: Mapping[str, Tensor], pattern: str) -> set[str]:
    """The different values of the pattern's group among the keys."""
    return {match[1] for match in (re.fullmatch(pattern, key) for key in state) if match}


def shape_of(state: Mapping[str, Tensor], key: str, dimensions: int | None = None) -> tuple[int, ...]:
    """Shape of a tensor that must be there, with so many dimensions. Raises OfficialError."""
    if key not in state:
        raise OfficialError(
            f"not a whole checkpoint of {SYSTEM}: 1 missing, e.g. {key}; use the file as its authors published it"
        )
    shape = tuple(state[key].shape)
    if not shape or 0 in shape or (dimensions is not None and len(shape) != dimensions):
        raise OfficialError(
            f"{key}: found shape {shape}, expected {dimensions or 'at least 1'} dimensions, none of length 0"
        )
    return shape


def backbone_config(layout: Layout, num_heads: int | None, notices: list[str]) -> BackboneConfig:
    """The vision transformer; assumptions are added to `notices`. Raises OfficialError."""
    if num_heads is None:
        num_heads = max(1, layout.embed_dim // HEAD_WIDTH)
        notices.append(f"{num_heads} attention heads assumed, one per {HEAD_WIDTH} channels (give num_heads otherwise)")
    if num_heads < 1 or layout.embed_dim % num_heads:
        raise OfficialError(f"num_heads: found {num_heads}, expected a divisor of the width, {layout.embed_dim}")
    if layout.depth < layout.stages:
        raise OfficialError(
            f"{layout.depth} blocks of the vision transformer, expected at least one for each of {layout.stages} stages"
        )
    blocks = [layout.depth * (s + 1) // layout.stages for s in range(layout.stages)]
    notices.append(f"stages after the blocks {', '.join(map(str, blocks))} of {layout.depth}, evenly spaced")
    return BackboneConfig(
        name=VIT,
        pretrained=False,
        out_indices=tuple(block - 1 for block in blocks),
        patch_size=layout.patch_size,
        embed_dim=layout.embed_dim,
        depth=layout.depth,
        num_heads=num_heads,
        mlp_ratio=layout.mlp / layout.embed_dim,
        class_token=False,
    )


def decoder_config(layout: Layout, scan: str) -> ReleasedConfig:
    """The decoder, with its scan curve. Raises OfficialError for an unknown one."""
    name = SCANS.get(scan, scan)
    if name not in SCANS.values():
        raise OfficialError(f"scan: found {scan!r}, expected one of {', '.join(SCANS.values())}, or {', '.join(SCANS)}")
    return replace(layout.decoder, scan=name)


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
    if old is None and new[0] * new[1] == tokens:
        old = new
    if old is None:
        short = [rows for rows in range(1, side + 1) if tokens % rows == 0]
        pairs = [
            (rows, tokens // rows) for rows in dict.fromkeys([*short, *(tokens // rows for rows in reversed(short))])
        ]
        old = min(pairs, key=lambda pair: abs(math.log(pair[0] * new[1] / (pair[1] * new[0]))))
        notices.append(
            f"the checkpoint's {tokens} positions taken as {old[0]}×{old[1]} (give checkpoint_size where that is wrong)"
        )
    new = new or old
    if new != old:
        notices.append(
            f"position embeddings (bicubic) and the routers' weights of positions (bilinear) resized from {old[0]}×{old[1]} to "
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


def constant(name: str) -> bool:
    """Whether our tensor of this name is one that training holds constant."""
    return name.rsplit(".", 1)[-1] in CONSTANTS


def default(name: str, tensor: Tensor) -> Tensor:
    """The value of one of our constants, of the shape of `tensor`, where none is given."""
    tasks, *rest = tensor.shape
    if name.endswith(".A_log"):
        return init_A_log(tasks, channels=rest[0], state_size=rest[1]).detach()
    return torch.ones(tensor.shape) if name.endswith(".D") else torch.zeros(tensor.shape)


def constants_given(extras: Mapping[str, Tensor], names: Mapping[str, Place]) -> dict[str, Tensor]:
    """`extras` without the prefix of distributed training. Raises OfficialError for one that is no constant."""
    given = named_tensors(extras, "extras")
    wrong = [key for key in given if key not in names or not constant(names[key].own)]
    if wrong:
        known = [key for key, place in names.items() if constant(place.own)]
        raise OfficialError(f"extras: '{wrong[0]}' is none of the constants, which are e.g. {known[0]}, {known[-1]}")
    return given


def matches(state: Mapping[str, Tensor]) -> bool:
    """Whether these are a released PAMM's tensors."""
    return any(key.startswith(f"{STAGE}.") for key in state)


def read(
    state: Mapping[str, Tensor],
    *,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    scan: str = "hilbert",
    extras: Mapping[str, Tensor] | None = None,
    checkpoint_size: tuple[int, int] | None = None,
) -> MultiTaskModel:
    """The network with these weights and its `load_report`. Arguments and errors: see `pamm.official.load`."""
    layout = inspect(state)
    report = LoadReport(SYSTEM, notices=["backbone.pos_embed: its first row, a class token's, is not used"])
    old, new = grids(layout.tokens, layout.patch_size, image_size, checkpoint_size, report.notices)
    for notice in report.notices[1:]:
        log.warning(notice)
    config = ModelConfig(backbone_config(layout, num_heads, report.notices), decoder_config(layout, scan))
    if not (config.decoder.task_conv and config.decoder.experts.B and config.decoder.experts.C):
        report.notices.append(
            "task convolution or experts are off: read by their shapes, with no published outputs to compare"
        )
    tasks = tasks_of(layout.channels, report.notices)
    model = build_model(config, tasks, (new[0] * layout.patch_size, new[1] * layout.patch_size), "meta")
    own = model.state_dict()
    numbers, given_numbers = (sum(tensor.numel() for tensor in tensors.values()) for tensors in (own, state))
    if numbers > 8 * given_numbers and old == new:
        raise OfficialError(
            f"the network of these shapes has {numbers} numbers, the checkpoint {given_numbers}: shapes that do not belong "
            "together; use the file as its authors published it"
        )
    names = table(own, list(tasks))
    given = constants_given(extras or {}, names)
    report.used, report.ignored, report.missed = match_keys(state | given, names, CONSTANTS, UNUSED)
    report.parameters = count_parameters(state, [*report.used.keys() - given.keys(), *report.ignored])
    values = {name: default(name, tensor) for name, tensor in own.items() if constant(name)}
    model.load_state_dict(gather(own, report.used, on_grid(state | given, report.used, old, new), values), assign=True)
    model.load_report = report
    return model
