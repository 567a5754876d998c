"""Checkpoints of the published MTMamba and MTMamba++, the MMSegmentation-named Swin included.

The layout is a table: every key of the checkpoint → the places of the network where its parts lie. Read one way it loads a
checkpoint, read the other way it names the network's weights or gradients as the checkpoint does (`Reading.export`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pamm.checkpoint import CheckpointError
from pamm.data import dataset_options
from pamm.experiment import BackboneConfig, ConfigError, DataConfig, ModelConfig, MTMambaConfig
from pamm.models.backbone import Swin
from pamm.models.model import MultiTaskModel
from pamm.models.mtmamba import CTM, MFE, SCTM, STM, DenseHead, Stage
from pamm.models.registry import build_model
from pamm.tasks import Task, create_task

SWIN = "swin_large_patch4_window12_384"
"""timm's name of the published backbone; a checkpoint's own sizes replace its own."""

PUBLISHED_ORDER = ("semseg", "depth", "human_parts", "sal", "normals", "edge")
"""Order of the tasks in the published models."""

MMSEG_NAMES = {
    "patch_embed.proj.": "patch_embed.projection.",
    "layers.": "stages.",
    ".attn.": ".attn.w_msa.",
    ".mlp.fc1.": ".ffn.layers.0.0.",
    ".mlp.fc2.": ".ffn.layers.1.",
}
"""Part of a name in timm's Swin → in MMSegmentation's; in this order."""

INDEX = "relative_position_index"
"""Last part of the keys of a Swin buffer that is a function of the window alone."""


# -- forms: how the same numbers are arranged in the checkpoint and in the network -------------------------------------------


@dataclass(frozen=True)
class Form:
    """A rearrangement and its inverse, both linear, so that they hold for gradients as well."""

    to_network: Callable[[Tensor], Tensor]
    to_checkpoint: Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _transpose(weight: Tensor) -> Tensor:
    return weight.mT


def _drop_kernel(weight: Tensor) -> Tensor:
    return weight[..., 0, 0]


def _add_kernel(weight: Tensor) -> Tensor:
    return weight[..., None, None]


def _drop_kernel_transpose(weight: Tensor) -> Tensor:
    return weight[..., 0, 0].mT


def _transpose_add_kernel(weight: Tensor) -> Tensor:
    return weight.mT[..., None, None]


def _split_orders(x: Tensor) -> Tensor:
    return x.unflatten(0, (4, -1))


def _join_orders(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def merging_to_timm(weight: Tensor) -> Tensor:
    """PatchMerging over the last axis: MMSegmentation's (channel, then 00 01 10 11) → timm's (00 10 01 11, then channel)."""
    return weight.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)


def merging_to_mmseg(weight: Tensor) -> Tensor:
    """Inverse of `merging_to_timm`."""
    return weight.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)


SAME = Form(_same, _same)
LINEAR = Form(_transpose, _transpose)  # (o, i) ↔ (i, o)
POINTWISE = Form(_drop_kernel, _add_kernel)  # (o, i, 1, 1) ↔ (o, i)
POINTWISE_LINEAR = Form(_drop_kernel_transpose, _transpose_add_kernel)  # (o, i, 1, 1) ↔ (i, o)
PER_ORDER = Form(_split_orders, _join_orders)  # (K·e, …) ↔ (K, e, …)
MERGING = Form(merging_to_timm, merging_to_mmseg)


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's entry, or some of its first rows, lies in the network: tensor `key`, at `index`."""

    key: str
    index: Any = ()
    form: Form = SAME


Layout = dict[str, tuple[Place, ...]]
"""Key of the checkpoint → the places of its rows, one after another."""


@dataclass
class Reading:
    """What became of a checkpoint's keys; `model.reading` of a model that `pamm.official.load` returned.

    used: checkpoint key → the network's tensors that hold it. ignored: checkpoint key → the reason.
    missing: keys that the network needs and the checkpoint lacks (none, or reading fails).
    """

    system: str
    used: dict[str, list[str]]
    ignored: dict[str, str]
    missing: list[str] = field(default_factory=list)
    layout: Layout = field(default_factory=dict, repr=False)

    def export(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """The network's tensors, by name, under the checkpoint's keys and in its shapes; entries without a tensor are None.

        For gradients: `model.reading.export({name: p.grad for name, p in model.named_parameters()})`.
        """
        return {key: _gather(places, tensors) for key, places in self.layout.items()}

    def __str__(self) -> str:
        lines = [f"{self.system}: {len(self.used)} keys used, {len(self.ignored)} ignored, {len(self.missing)} missing"]
        return "\n".join([*lines, *(f"  ignored {key}: {reason}" for key, reason in self.ignored.items())])


def _gather(places: tuple[Place, ...], tensors: Mapping[str, Tensor | None]) -> Tensor | None:
    found = [tensors.get(place.key) for place in places]
    if any(tensor is None for tensor in found):
        return None
    parts = [p.form.to_checkpoint(tensor[p.index]) for p, tensor in zip(places, found, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# -- the entry of this file --------------------------------------------------------------------------------------------------


def matches(state: Mapping[str, Any]) -> bool:
    """Whether these are keys of MTMamba's or MTMamba++'s decoder."""
    return any(
        re.match(r"(expand_layers|concat_layers|block_stm|block_ctm|block_\d+|final_expand)\.", key) for key in state
    )


def read(
    state: Mapping[str, Tensor],
    *,
    image_size: tuple[int, int],
    num_heads: int | None = None,
    scan: str = "hilbert",
    extras: Mapping[str, Tensor] | None = None,
) -> MultiTaskModel:
    """The network of a checkpoint, in eval mode, with `model.reading` telling what became of every key.

    System, tasks, channels, widths, depths, heads, window and state size are taken from keys and shapes; `num_heads` and
    `scan`, which PAMM's checkpoints do not tell, are not needed here. Without `backbone.*` the network has no backbone and
    `model.decode(stages, size)` takes the stage maps. Raises CheckpointError naming keys that are missing, unknown or of
    another shape.
    """
    if extras:
        raise CheckpointError(
            f"extras hold {', '.join(extras)}, but an MTMamba checkpoint is complete; leave extras out"
        )
    weights = {key: value for key, value in state.items() if not key.endswith(INDEX)}
    try:
        config, tasks = tell_model(weights), tell_tasks(weights)
        model = build_model(config, tasks, image_size)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError) and "data.size" in str(error):
            raise
        raise CheckpointError(f"not a whole MTMamba checkpoint: {type(error).__name__} {error}") from error
    layout = dict(_layout(model, config.decoder.system))
    own = model.state_dict()
    _check_keys(weights, {key: _gather(places, own) for key, places in layout.items()})
    model.load_state_dict(_network_state(layout, weights, own))
    model.reading = Reading(
        config.decoder.system,
        {key: [place.key for place in places] for key, places in layout.items()},
        _check_indices(state, model),
        layout=layout,
    )
    return model.eval()


def _network_state(layout: Layout, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's numbers in the network's tensors."""
    filled = {key: torch.empty_like(value) for key, value in own.items()}
    for key, places in layout.items():
        parts = [weights[key]]
        if len(places) > 1:
            parts = weights[key].split([len(p.form.to_checkpoint(own[p.key][p.index])) for p in places])
        for place, part in zip(places, parts, strict=True):
            filled[place.key][place.index] = place.form.to_network(part).to(filled[place.key])
    return filled


def _check_keys(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the checkpoint has exactly the expected keys and shapes."""
    shapes = [
        f"{key} {list(weights[key].shape)} instead of {list(expected[key].shape)}"
        for key in expected
        if key in weights and weights[key].shape != expected[key].shape
    ]
    missing = [key for key in expected if key not in weights]
    unknown = [key for key in weights if key not in expected]
    parts = [("missing", missing), ("unknown", unknown), ("of another shape", shapes)]
    told = "; ".join(f"{len(keys)} {what}, e.g. {', '.join(keys[:3])}" for what, keys in parts if keys)
    if told:
        raise CheckpointError(f"not a whole checkpoint of the published MTMamba: keys {told}. Download it again")


def _check_indices(state: Mapping[str, Tensor], model: MultiTaskModel) -> dict[str, str]:
    """The Swin's index buffers, which are ignored. Raises CheckpointError for one that numbers positions differently."""
    buffers = model.backbone.named_buffers()
    own = {f"backbone.{_mmseg_name(name, model.backbone.taps)}": index for name, index in buffers}
    ignored = {key: "a function of the window's size, computed anew" for key in state if key.endswith(INDEX)}
    for key in ignored:
        if key not in own:
            raise CheckpointError(f"{key} belongs to no block of the checkpoint. Download it again")
        if not state[key].is_floating_point() and not torch.equal(state[key], own[key]):
            raise CheckpointError(f"{key} numbers the positions of a window in another way than Swin does")
    return ignored


# -- what keys and shapes tell -----------------------------------------------------------------------------------------------


def tell_tasks(weights: Mapping[str, Tensor]) -> dict[str, Task]:
    """The tasks, in the order of the keys; where the keys are sorted by name, which loses it, in the published order."""
    found = [re.match(r"expand_layers\.(.+)_\d+\.", key) for key in weights]
    names = list(dict.fromkeys(match[1] for match in found if match))
    if list(weights) == sorted(weights) and set(names) <= set(PUBLISHED_ORDER):
        names.sort(key=PUBLISHED_ORDER.index)
    return {name: _tell_task(name, len(weights[f"final_project.{name}.weight"])) for name in names}


def _tell_task(name: str, channels: int) -> Task:
    """The task `name` with so many outputs; classes are those of the data set that has so many, else numbered."""
    task = create_task(name)
    if "classes" in task.options() and task.channels != channels:
        known = (dataset_options(DataConfig(name=data)) for data in ("pascal", "nyud", "cityscapes"))
        names = (options[name]["classes"] for options in known if "classes" in options.get(name, {}))
        classes = next((c for c in names if len(c) == channels), [f"class {i}" for i in range(channels)])
        task = create_task(name, classes=classes)
    if task.channels != channels:
        raise CheckpointError(f"final_project.{name} has {channels} outputs, but the task '{name}' has {task.channels}")
    return task


def tell_model(weights: Mapping[str, Tensor]) -> ModelConfig:
    """Backbone and decoder, from keys and shapes alone."""
    first = next(re.match(r"expand_layers\.(.+)_\d+\.", key)[1] for key in weights if key.startswith("expand_layers."))
    stages = _count(weights, rf"concat_layers\.{first}_(\d+)\.weight")
    width = len(weights[f"concat_layers.{first}_{stages - 1}.weight"])
    plus = any(key.startswith(("block_stm.", "block_ctm.")) for key in weights)
    pattern = rf"block_stm\.{first}_0\.(\d+)\.norm\.weight" if plus else rf"block_(\d+)\.{first}_0\.norm\.weight"
    narrow, wide = next(value.shape for key, value in weights.items() if re.search(r"\bout_proj\.", key))
    decoder = MTMambaConfig(
        system="mtmamba++" if plus else "mtmamba",
        stm=_count(weights, pattern),
        ctm=any("norm_share" in key for key in weights),
        expand=wide // narrow,
        state_size=next(value.shape[-1] for key, value in weights.items() if key.endswith("A_logs")),
        head_width=len(weights[f"final_expand.{first}.0.weight"]) if plus else MTMambaConfig.head_width,
    )
    return ModelConfig(_tell_backbone(weights, width, stages + 1), decoder)


def _tell_backbone(weights: Mapping[str, Tensor], width: int, stages: int) -> BackboneConfig:
    """The MMSegmentation-named Swin, or, without `backbone.*`, none that gives stage maps from `width` channels on."""
    taps = tuple(range(1, stages + 1))
    if not any(key.startswith("backbone.") for key in weights):
        return BackboneConfig("none", False, taps, width=width)
    patch = weights["backbone.patch_embed.projection.weight"]
    depths = [_count(weights, rf"backbone\.stages\.{i}\.blocks\.(\d+)\.norm1\.weight") for i in range(stages)]
    table = "backbone.stages.{}.blocks.0.attn.w_msa.relative_position_bias_table"
    tables = [weights[table.format(i)] for i in range(stages)]
    return BackboneConfig(
        SWIN,
        False,
        taps,
        drop_path=0.1,
        patch=patch.shape[-1],
        width=patch.shape[0],
        stage_depths=tuple(depths),
        stage_heads=tuple(table.shape[1] for table in tables),
        window=(round(len(tables[0]) ** 0.5) + 1) // 2,
    )


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers the group of `pattern` takes over all keys."""
    return len({match[1] for key in weights if (match := re.fullmatch(pattern, key))})


# -- the table ---------------------------------------------------------------------------------------------------------------

Entries = Iterator[tuple[str, tuple[Place, ...]]]


def _layout(model: MultiTaskModel, system: str) -> Entries:
    """Every key of the published checkpoint of this network, with its places."""
    if isinstance(model.backbone, Swin):
        for name in model.backbone.state_dict():
            form = MERGING if ".downsample." in name else SAME
            yield f"backbone.{_mmseg_name(name, model.backbone.taps)}", (Place(f"backbone.{name}", (), form),)
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


def _mmseg_name(name: str, taps: tuple[int, ...]) -> str:
    """Name of a tensor of `Swin` → MMSegmentation's, where a stage ends, not begins, with its downsampling."""
    name = re.sub(r"^norms\.(\d+)", lambda m: f"norm{taps[int(m[1])] - 1}", name.removeprefix("swin."))
    name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) - 1}.downsample", name)
    for timm, mmseg in MMSEG_NAMES.items():
        name = name.replace(timm, mmseg)
    return name


def _task_entries(stage: Stage, place: str, ours: str, task: int, system: str) -> Entries:
    """A task's part of a stage; `place` is <task>_<stage>, as the published keys have it."""
    plus = system == "mtmamba++"
    yield f"expand_layers.{place}.expand.weight", (Place(f"{ours}.expand.linear.weight", task, LINEAR),)
    yield from _pair(f"expand_layers.{place}.norm", f"{ours}.expand.norm", task)
    form = POINTWISE_LINEAR if plus else LINEAR
    yield f"concat_layers.{place}.weight", (Place(f"{ours}.reduce.weight", task, form),)
    yield f"concat_layers.{place}.bias", (Place(f"{ours}.reduce.bias", (task, 0)),)
    for number, block in enumerate(stage.stm):
        theirs = f"block_stm.{place}.{number}" if plus else f"block_{number + 1}.{place}"
        yield from _pair(f"{theirs}.norm", f"{ours}.stm.{number}.norm", task)
        yield from _gated_entries(block, f"{theirs}.op", f"{ours}.stm.{number}", task)


def _gated_entries(block: STM, theirs: str, ours: str, task: int) -> Entries:
    """Extractor, gate and output projection of an STM block."""
    places = Place(f"{ours}.extract.expand.weight", task, LINEAR), Place(f"{ours}.gate.weight", task, LINEAR)
    yield f"{theirs}.in_proj.weight", places
    yield from _scan_entries(block.extract, theirs, f"{ours}.extract", task)
    yield f"{theirs}.out_proj.weight", (Place(f"{ours}.contract.weight", task, LINEAR),)


def _scan_entries(extract: MFE, theirs: str, ours: str, task: int) -> Entries:
    """All of MFE but its Linear."""
    channels = extract.norm.weight.shape[-1]
    rows = slice(task * channels, (task + 1) * channels)
    yield f"{theirs}.x_proj_weight", (Place(f"{ours}.scan.select", task),)
    yield f"{theirs}.dt_projs_weight", (Place(f"{ours}.scan.delta", task),)
    yield f"{theirs}.dt_projs_bias", (Place(f"{ours}.scan.delta_bias", task),)
    yield f"{theirs}.A_logs", (Place(f"{ours}.scan.A_log", task, PER_ORDER),)
    yield f"{theirs}.Ds", (Place(f"{ours}.scan.D", task, PER_ORDER),)
    yield from _pair(f"{theirs}.conv2d", f"{ours}.conv.conv", rows)
    yield from _pair(f"{theirs}.out_norm", f"{ours}.norm", task)


def _ctm_entries(block: CTM, theirs: str, ours: str, tasks: list[str]) -> Entries:
    for task, name in enumerate(tasks):
        yield from _pair(f"{theirs}.norm.{name}", f"{ours}.norm", task)
        yield f"{theirs}.op.{name}.in_proj.weight", (Place(f"{ours}.extract.expand.weight", task, LINEAR),)
        yield from _scan_entries(block.extract, f"{theirs}.op.{name}", f"{ours}.extract", task)
        yield f"{theirs}.in_proj.{name}.weight", (Place(f"{ours}.gate.weight", task, LINEAR),)
        yield f"{theirs}.out_proj.{name}.weight", (Place(f"{ours}.contract.weight", task, LINEAR),)
    yield from _pair(f"{theirs}.norm_share", f"{ours}.norm_shared", 0)
    yield f"{theirs}.op_share.in_proj.weight", (Place(f"{ours}.extract_shared.expand.weight", 0, LINEAR),)
    yield from _scan_entries(block.extract_shared, f"{theirs}.op_share", f"{ours}.extract_shared", 0)


def _sctm_entries(block: SCTM, theirs: str, ours: str, tasks: list[str]) -> Entries:
    yield from _pair(f"{theirs}.norm_share", f"{ours}.norm_shared", 0)
    for layer in (0, 1):
        yield from _pair(f"{theirs}.conv_share.{layer}", f"{ours}.share.{layer}")
    for task, name in enumerate(tasks):
        yield from _pair(f"{theirs}.norm.{name}", f"{ours}.norm", task)
        yield f"{theirs}.op.{name}.in_proj_cross.weight", (Place(f"{ours}.cross.weight", task, LINEAR),)
        yield from _gated_entries(block, f"{theirs}.op.{name}", ours, task)


def _head_entries(head: nn.Module, name: str) -> Entries:
    ours, expand, project = f"heads.{name}", f"final_expand.{name}", f"final_project.{name}"
    if isinstance(head, DenseHead):
        yield f"{expand}.expand.weight", (Place(f"{ours}.expand.weight"),)
        yield from _pair(f"{expand}.norm", f"{ours}.norm")
        yield f"{project}.weight", (Place(f"{ours}.predict.weight", (), POINTWISE),)
        yield f"{project}.bias", (Place(f"{ours}.predict.bias"),)
    else:
        yield from _pair(f"{expand}.0", f"{ours}.0")
        for key in head[1].state_dict():
            yield f"{expand}.1.{key}", (Place(f"{ours}.1.{key}"),)
        yield from _pair(project, f"{ours}.3")


def _pair(theirs: str, ours: str, index: Any = ()) -> Entries:
    """Weight and bias."""
    for key in ("weight", "bias"):
        yield f"{theirs}.{key}", (Place(f"{ours}.{key}", index),)
