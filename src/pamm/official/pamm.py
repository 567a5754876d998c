"""Checkpoints of the released PAMM (`backbone.stage_MTLoRA_mamba.*`)."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pamm.config.experiment import BackboneConfig, ExpertsConfig, ModelConfig, ReleasedConfig
from pamm.models.model import MultiTaskModel
from pamm.models.registry import build_model
from pamm.nn.ssm import init_A_log
from pamm.official.files import named_tensors
from pamm.official.names import LoadReport, OfficialError, Place, count_parameters, gather, match_keys, places
from pamm.official.tasks import task_order, tasks_of
from pamm.official.vit import CLASS_ROW, HEAD_WIDTH, ROUTER, VIT, check_numbers, grids, numbers_of, on_grid, shape_of

SYSTEM = "pamm-released"

STAGE = "backbone.stage_MTLoRA_mamba"

TOP_K = 9
"""Experts kept; the published code leaves its own setting unused here."""

SCANS = {"h": "hilbert", "s": "snake", "z": "morton"}
"""The published code's letters."""

_EXPERTS = (
    *((f"routers.{{t}}.{ours}", f"router.{{t}}.{theirs}") for ours, theirs in ROUTER),
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
    embed_dim, _, patch_size, _ = shape_of(state, "backbone.patch_embed.proj.weight", 4, SYSTEM)
    return Layout(
        channels={task: shape_of(state, f"heads.{task}.linear_pred.weight", 4, SYSTEM)[0] for task in tasks},
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=len(numbers_of(state, r"backbone\.blocks\.(\d+)\..+")),
        mlp=shape_of(state, "backbone.blocks.0.mlp.fc1.weight", 2, SYSTEM)[0],
        tokens=shape_of(state, "backbone.pos_embed", 3, SYSTEM)[1] - 1,
        stages=len(numbers_of(state, rf"{re.escape(STAGE)}\.(\d+)\..+")),
        decoder=inspect_decoder(state, tasks[0]),
    )


def inspect_decoder(state: Mapping[str, Tensor], task: str) -> ReleasedConfig:
    """The decoder's settings, from the first stage and one of its tasks."""
    first = f"{STAGE}.0"
    width = shape_of(state, f"{first}.first_decode.weight", 4, SYSTEM)[0]
    expanded = shape_of(state, f"{first}.dim_expand_proj_x0.{task}.weight", 4, SYSTEM)[0]
    if expanded % width:
        raise OfficialError(f"{first}.dim_expand_proj_x0: found {expanded} channels, expected a multiple of {width}")
    has = {p: any(key.startswith(f"{first}.{p}_proj0.MoE.") for key in state) for p in "BC"}
    experts, kernel = ExpertsConfig(B=has["B"], C=has["C"]), ReleasedConfig.kernel_size
    for p in (p for p in "BC" if has[p]):
        rank, _, kernel, _ = shape_of(state, f"{first}.{p}_proj0.MoE.0.W.weight", 4, SYSTEM)
        count = len(numbers_of(state, rf"{re.escape(first)}\.{p}_proj0\.MoE\.(\d+)\..+"))
        experts = replace(experts, count=count, rank=rank, top_k=min(TOP_K, count))
    plain = next((f"{first}.{p}_proj0.{task}" for p in "BC" if not has[p]), None)
    rank_delta = shape_of(state, f"{first}.x2dt_proj0.{task}.weight", 2, SYSTEM)[0]
    size_key = f"{first}.B_proj0.Bn.{task}.weight" if has["B"] else f"{plain}.weight"
    return ReleasedConfig(
        width=width,
        expand=expanded // width,
        delta_rank=rank_delta if rank_delta != math.ceil(width / 16) else None,
        state_size=shape_of(state, size_key, None, SYSTEM)[0],
        shared_bias=f"{first}.first_decode.bias" in state,
        task_conv=any(key.startswith(f"{first}.task_conv.") for key in state),
        experts=experts,
        kernel_size=kernel,
        projection_bias=f"{plain}.bias" in state,
    )


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
    report = LoadReport(SYSTEM, notices=[CLASS_ROW])
    old, new = grids(layout.tokens, layout.patch_size, image_size, checkpoint_size, report.notices)
    for notice in report.notices[1:]:
        log.warning(notice)
    decoder = decoder_config(layout, scan)
    config = ModelConfig(backbone_config(layout, num_heads, report.notices), decoder)
    if not (decoder.task_conv and decoder.experts.B and decoder.experts.C):
        report.notices.append(
            "task convolution or experts are off: read by their shapes, with no published outputs to compare"
        )
    tasks = tasks_of(layout.channels, report.notices)
    model = build_model(config, tasks, (new[0] * layout.patch_size, new[1] * layout.patch_size), "meta")
    own = model.state_dict()
    if old == new:
        check_numbers(own, state)
    names = table(own, list(tasks))
    given = constants_given(extras or {}, names)
    report.used, report.ignored, report.missed = match_keys({**state, **given}, names, CONSTANTS, UNUSED)
    report.parameters = count_parameters(state, [*report.used.keys() - given.keys(), *report.ignored])
    values = {name: default(name, tensor) for name, tensor in own.items() if constant(name)}
    model.load_state_dict(
        gather(own, report.used, on_grid({**state, **given}, report.used, old, new), values), assign=True
    )
    model.load_report = report
    return model
