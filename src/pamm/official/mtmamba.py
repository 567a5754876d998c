"""Checkpoints of the published MTMamba and MTMamba++, their MMSegmentation-named Swin included.

The layout is a table: every key of the checkpoint → the parts of the network's tensors that hold its rows, and how they are
arranged there. Arrangements are linear and one to one, so the table names weights and gradients both ways.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pamm.config.experiment import BackboneConfig, ModelConfig, MTMambaConfig
from pamm.config.strict import ConfigError
from pamm.models.backbone import Swin
from pamm.models.model import MultiTaskModel
from pamm.models.mtmamba import CTM, MFE, SCTM, STM, DenseHead, LiteHead, Stage
from pamm.models.registry import WithoutDraws, build_model
from pamm.official.names import LoadReport, OfficialError, count_parameters, match_keys
from pamm.official.parts import (
    MERGING,
    PER_ORDER,
    POINTWISE,
    SAME,
    Part,
    Parts,
    network_tensors,
    place,
)
from pamm.official.tasks import task_order, tasks_of
from pamm.tasks import Task

SYSTEM = "mtmamba"

SWIN = "swin_large_patch4_window12_384"
"""The timm model whose kind the backbone is; its sizes are the checkpoint's."""

DEFAULT_SIZE = (512, 512)
"""Height and width, pixels, where none is given."""

MMSEG_NAMES = {
    "patch_embed.proj.": "patch_embed.projection.",
    "layers.": "stages.",
    ".attn.": ".attn.w_msa.",
    ".mlp.fc1.": ".ffn.layers.0.0.",
    ".mlp.fc2.": ".ffn.layers.1.",
}
"""Part of a name in timm's Swin → in MMSegmentation's; in this order."""

INDEX = "relative_position_index"
"""Last part of the name of a Swin buffer."""

UNUSED = {
    r"backbone\.stages\.\d+\.blocks\.\d+\.attn\.w_msa\." + INDEX: "a function of the window's size, computed anew"
}
"""Pattern of their keys → why the network needs none of them."""


# -- the entry of this file --------------------------------------------------------------------------------------------------


def matches(state: Mapping[str, Any]) -> bool:
    """Whether these are tensors of MTMamba's or MTMamba++'s decoder."""
    return any(
        re.match(r"(expand_layers|concat_layers|block_stm|block_ctm|block_\d+|final_expand)\.", key) for key in state
    )


def read(
    state: Mapping[str, Tensor],
    *,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    scan: str | None = None,
    extras: Mapping[str, Tensor] | None = None,
    checkpoint_size: tuple[int, int] | None = None,
) -> MultiTaskModel:
    """The network with these weights and its `load_report`. Errors: see `pamm.official.load`.

    Keys and shapes determine everything, also attention heads and scan, and no tensor depends on a size: num_heads,
    scan and checkpoint_size are not needed, and the report says so of those given. Without `backbone.*` the network has no
    backbone, and `model.decode(stages, size)` takes the stage maps.
    """
    if extras:
        raise OfficialError(
            f"extras: found {', '.join(extras)}, but a checkpoint of {SYSTEM} is complete; leave extras out"
        )
    report = LoadReport(SYSTEM)
    options = {"num_heads": num_heads, "scan": scan, "checkpoint_size": checkpoint_size}
    unneeded = ", ".join(name for name, value in options.items() if value is not None)
    if unneeded:
        report.notices.append(f"{unneeded}: given and not used, since keys and shapes determine it")
    if image_size is None:
        image_size = DEFAULT_SIZE
        report.notices.append(
            f"image_size {image_size[0]}×{image_size[1]} taken: images are shrunk to it for prediction"
        )
    config, tasks = inspect(state, report.notices)
    meta = any(tensor.is_meta for tensor in state.values())
    try:
        model = build_model(config, tasks, image_size, "meta")
    except (ConfigError, ValueError) as error:
        raise OfficialError(
            f"no network has these shapes at {image_size[0]}×{image_size[1]} pixels: {error}"
        ) from error
    table = dict(layout(model, config.decoder.system))
    report.system = config.decoder.system
    used, report.ignored, _ = match_keys(state, table, {}, UNUSED)
    report.used, report.parameters = used, count_parameters(state, used)
    shapes = {key: tensor.to("meta") for key, tensor in state.items()}
    network_tensors(used, shapes, model.state_dict())  # all fit together, before any memory is taken for them
    if not meta:
        with WithoutDraws():
            model = build_model(config, tasks, image_size)
    check_indices(state, model)
    model.load_state_dict(network_tensors(used, state, model.state_dict()), assign=meta)
    model.load_report = report
    return model


def check_indices(state: Mapping[str, Tensor], model: MultiTaskModel) -> None:
    """Raise OfficialError for an index buffer of the Swin that numbers the positions of a window in another way."""
    buffers = {name: value for name, value in model.backbone.named_buffers() if name.endswith(INDEX)}
    for name, own in buffers.items():
        theirs = state.get(f"backbone.{mmseg_name(name, model.backbone.out_indices)}")
        if theirs is None or theirs.is_meta or theirs.is_floating_point():
            continue
        if not torch.equal(theirs, own):
            raise OfficialError(
                f"{mmseg_name(name, model.backbone.out_indices)}: positions are numbered in another way than Swin's"
            )


# -- from keys and shapes -----------------------------------------------------------------------------------------------------


def inspect(state: Mapping[str, Tensor], notices: list[str]) -> tuple[ModelConfig, dict[str, Task]]:
    """Backbone, decoder and tasks, from keys and shapes. Raises OfficialError."""
    found = re.findall(r"^expand_layers\.(.+)_\d+\.expand\.weight$", "\n".join(state), flags=re.MULTILINE)
    ordered = task_order(found)
    tasks = list(dict.fromkeys(found))
    if sorted_by_name(state) and tasks != ordered:  # the order of the keys says nothing of that of the tasks
        tasks = ordered
        notices.append(f"the keys are sorted, so the tasks are taken in the benchmarks' order: {', '.join(tasks)}")
    channels = {task: len(tensor_of(state, f"final_project.{task}.weight", 4)) for task in tasks}
    stages = count_of(state, rf"concat_layers\.{tasks[0]}_(\d+)\.weight")
    width = len(tensor_of(state, f"concat_layers.{tasks[0]}_{max(stages, 1) - 1}.weight"))
    model = ModelConfig(inspect_backbone(state, width, stages + 1), inspect_decoder(state, tasks[0]))
    return model, tasks_of(channels, notices)


def sorted_by_name(state: Mapping[str, Tensor]) -> bool:
    """Whether a format arranged the keys: by name, as safetensors does among the tensors of every data type."""
    kinds: dict[torch.dtype, list[str]] = {}
    for key, tensor in state.items():
        kinds.setdefault(tensor.dtype, []).append(key)
    return all(keys == sorted(keys) for keys in kinds.values())


def inspect_decoder(state: Mapping[str, Tensor], task: str) -> MTMambaConfig:
    """The decoder's settings, from one task's tensors."""
    plus = any(key.startswith(("block_stm.", "block_ctm.")) for key in state)
    block = rf"block_stm\.{task}_0\.(\d+)" if plus else rf"block_(\d+)\.{task}_0"
    first = f"block_stm.{task}_0.0.op" if plus else f"block_1.{task}_0.op"
    narrow, wide = tensor_of(state, f"{first}.out_proj.weight", 2).shape
    return MTMambaConfig(
        system="mtmamba++" if plus else "mtmamba",
        stm=count_of(state, rf"{block}\.norm\.weight"),
        ctm=any("norm_share" in key for key in state),
        expand=max(1, wide // narrow),
        state_size=tensor_of(state, f"{first}.A_logs", 2).shape[1],
        head_width=len(tensor_of(state, f"final_expand.{task}.0.weight", 4)) if plus else MTMambaConfig.head_width,
    )


def inspect_backbone(state: Mapping[str, Tensor], width: int, stages: int) -> BackboneConfig:
    """The Swin, or, without `backbone.*`, none: stage maps of `width` channels and doubles of it come from elsewhere."""
    out_indices = tuple(range(stages))
    if not any(key.startswith("backbone.") for key in state):
        return BackboneConfig("none", False, out_indices, embed_dim=width)
    patch = tensor_of(state, "backbone.patch_embed.projection.weight", 4)
    table = "backbone.stages.{}.blocks.0.attn.w_msa.relative_position_bias_table"
    tables = [tensor_of(state, table.format(i), 2) for i in range(stages)]
    blocks = r"backbone\.stages\.{}\.blocks\.(\d+)\.norm1\.weight"
    return BackboneConfig(
        SWIN,
        False,
        out_indices,
        drop_path_rate=0.1,
        patch_size=patch.shape[-1],
        embed_dim=patch.shape[0],
        depths=tuple(count_of(state, blocks.format(i)) for i in range(stages)),
        num_heads=tuple(table.shape[1] for table in tables),
        window_size=(math.isqrt(len(tables[0])) + 1) // 2,
        mlp_ratio=len(tensor_of(state, "backbone.stages.0.blocks.0.ffn.layers.0.0.weight", 2)) / patch.shape[0],
    )


def count_of(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many values the group of `pattern` takes among the keys."""
    return len({match[1] for match in (re.fullmatch(pattern, key) for key in state) if match})


def tensor_of(state: Mapping[str, Tensor], key: str, dimensions: int | None = None) -> Tensor:
    """A tensor that must be there, with so many dimensions, none empty. Raises OfficialError."""
    if key not in state:
        raise OfficialError(
            f"not a whole checkpoint of {SYSTEM}: 1 missing, e.g. {key}; use the file as its authors published it"
        )
    shape = tuple(state[key].shape)
    if not shape or 0 in shape or (dimensions is not None and len(shape) != dimensions):
        raise OfficialError(
            f"{key}: found shape {shape}, expected {dimensions or 'at least 1'} dimensions, none of length 0"
        )
    return state[key]


# -- the table ---------------------------------------------------------------------------------------------------------------

Entries = Iterator[tuple[str, Parts]]


def layout(model: MultiTaskModel, system: str) -> Entries:
    """Every key of the published checkpoint of this network, with its places."""
    if isinstance(model.backbone, Swin):
        for name in model.backbone.state_dict():
            form = MERGING if ".downsample." in name else SAME
            yield f"backbone.{mmseg_name(name, model.backbone.out_indices)}", place(Part(f"backbone.{name}", (), form))
    for number, stage in enumerate(model.decoder.stages):
        ours = f"decoder.stages.{number}"
        for task, name in enumerate(model.decoder.tasks):
            yield from _task_entries(stage, f"{name}_{number}", ours, task, system)
        if isinstance(stage.ctm, CTM):
            yield from _ctm_entries(
                stage.ctm, f"block_{len(stage.stm) + 1}.{number}", f"{ours}.ctm", model.decoder.tasks
            )
        elif isinstance(stage.ctm, SCTM):
            yield from _sctm_entries(stage.ctm, f"block_ctm.{number}.0", f"{ours}.ctm", model.decoder.tasks)
    for name, head in model.heads.items():
        yield from _head_entries(head, name)


def mmseg_name(name: str, out_indices: tuple[int, ...]) -> str:
    """Name of a tensor of `Swin` → MMSegmentation's, where a stage ends, not begins, with its downsampling."""
    name = re.sub(r"^norms\.(\d+)", lambda m: f"norm{out_indices[int(m[1])]}", name.removeprefix("swin."))
    name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) - 1}.downsample", name)
    for timm, mmseg in MMSEG_NAMES.items():
        name = name.replace(timm, mmseg)
    return name


def _task_entries(stage: Stage, spot: str, ours: str, task: int, system: str) -> Entries:
    """A task's part of a stage; `spot` is <task>_<stage>, as the published keys have it."""
    plus = system == "mtmamba++"
    yield f"expand_layers.{spot}.expand.weight", place(Part(f"{ours}.expand.linear.weight", task))
    yield from _pair(f"expand_layers.{spot}.norm", f"{ours}.expand.norm", task)
    form = POINTWISE if plus else SAME
    yield f"concat_layers.{spot}.weight", place(Part(f"{ours}.reduce.weight", task, form))
    yield f"concat_layers.{spot}.bias", place(Part(f"{ours}.reduce.bias", (task, 0)))
    for number, block in enumerate(stage.stm):
        theirs = f"block_stm.{spot}.{number}" if plus else f"block_{number + 1}.{spot}"
        yield from _pair(f"{theirs}.norm", f"{ours}.stm.{number}.norm", task)
        assert isinstance(block, STM)
        yield from _gated_entries(block, f"{theirs}.op", f"{ours}.stm.{number}", task)


def _gated_entries(block: STM, theirs: str, ours: str, task: int) -> Entries:
    """Extractor, gate and output projection of an STM block."""
    expand, gate = (Part(f"{ours}.{name}.weight", task) for name in ("extract.expand", "gate"))
    yield f"{theirs}.in_proj.weight", place(expand, gate)
    yield from _scan_entries(block.extract, theirs, f"{ours}.extract", task)
    yield f"{theirs}.out_proj.weight", place(Part(f"{ours}.contract.weight", task))


def _scan_entries(extract: nn.Module, theirs: str, ours: str, task: int) -> Entries:
    """All of MFE but its Linear."""
    assert isinstance(extract, MFE)  # published checkpoints have no other
    channels = extract.norm.weight.shape[-1]
    rows = slice(task * channels, (task + 1) * channels)
    yield f"{theirs}.x_proj_weight", place(Part(f"{ours}.scan.select", task))
    yield f"{theirs}.dt_projs_weight", place(Part(f"{ours}.scan.delta", task))
    yield f"{theirs}.dt_projs_bias", place(Part(f"{ours}.scan.delta_bias", task))
    yield f"{theirs}.A_logs", place(Part(f"{ours}.scan.A_log", task, PER_ORDER))
    yield f"{theirs}.Ds", place(Part(f"{ours}.scan.D", task, PER_ORDER))
    yield from _pair(f"{theirs}.conv2d", f"{ours}.conv.conv", rows)
    yield from _pair(f"{theirs}.out_norm", f"{ours}.norm", task)


def _ctm_entries(block: CTM, theirs: str, ours: str, tasks: list[str]) -> Entries:
    for task, name in enumerate(tasks):
        yield from _pair(f"{theirs}.norm.{name}", f"{ours}.norm", task)
        yield f"{theirs}.op.{name}.in_proj.weight", place(Part(f"{ours}.extract.expand.weight", task))
        yield from _scan_entries(block.extract, f"{theirs}.op.{name}", f"{ours}.extract", task)
        yield f"{theirs}.in_proj.{name}.weight", place(Part(f"{ours}.gate.weight", task))
        yield f"{theirs}.out_proj.{name}.weight", place(Part(f"{ours}.contract.weight", task))
    yield from _pair(f"{theirs}.norm_share", f"{ours}.norm_shared", 0)
    yield f"{theirs}.op_share.in_proj.weight", place(Part(f"{ours}.extract_shared.expand.weight", 0))
    yield from _scan_entries(block.extract_shared, f"{theirs}.op_share", f"{ours}.extract_shared", 0)


def _sctm_entries(block: SCTM, theirs: str, ours: str, tasks: list[str]) -> Entries:
    yield from _pair(f"{theirs}.norm_share", f"{ours}.norm_shared", 0)
    for layer in (0, 1):
        yield from _pair(f"{theirs}.conv_share.{layer}", f"{ours}.share.{layer}")
    for task, name in enumerate(tasks):
        yield from _pair(f"{theirs}.norm.{name}", f"{ours}.norm", task)
        yield f"{theirs}.op.{name}.in_proj_cross.weight", place(Part(f"{ours}.cross.weight", task))
        yield from _gated_entries(block, f"{theirs}.op.{name}", ours, task)


def _head_entries(head: nn.Module, name: str) -> Entries:
    ours, expand, project = f"heads.{name}", f"final_expand.{name}", f"final_project.{name}"
    if isinstance(head, DenseHead):
        yield f"{expand}.expand.weight", place(Part(f"{ours}.expand.weight"))
        yield from _pair(f"{expand}.norm", f"{ours}.norm")
        yield f"{project}.weight", place(Part(f"{ours}.predict.weight", (), POINTWISE))
        yield f"{project}.bias", place(Part(f"{ours}.predict.bias"))
    else:
        yield from _pair(f"{expand}.0", f"{ours}.0")
        assert isinstance(head, LiteHead)
        for key in head[1].state_dict():
            yield f"{expand}.1.{key}", place(Part(f"{ours}.1.{key}"))
        yield from _pair(project, f"{ours}.3")


def _pair(theirs: str, ours: str, index: Any = ()) -> Entries:
    """Weight and bias."""
    for key in ("weight", "bias"):
        yield f"{theirs}.{key}", place(Part(f"{ours}.{key}", index))
