"""Checkpoints of the published TaskPrompter on a Swin Transformer (Cityscapes-3D), without its head for 3-D detection."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from pamm.config.experiment import BackboneConfig, ModelConfig
from pamm.config.peers import TaskPrompterConfig
from pamm.models.model import MultiTaskModel
from pamm.nn.prompts import resize_pixels
from pamm.official.facts import Fact, Facts, Published, shape_facts
from pamm.official.names import LoadReport, OfficialError, Place, places
from pamm.official.vit import finish, grids, head_channels, numbers_of, shape_of

SYSTEM = "taskprompter-swin"

FACTS = {
    "image_ratio": Fact(
        float, "ratio by which the image is first resized", "the training's yml file; 0.75 for Cityscapes"
    ),
    "chan_nheads": Fact(int, "windows of the channel scores", "the training's yml file; 1 for Cityscapes"),
    "use_ctr": Fact(bool, "whether there is cross-task reweighting; a Swin has none"),
    **shape_facts(
        embed_dim="channels of the first stage",
        depths="blocks of the stages",
        heads="attention heads of the stages",
        window="side of the windows, tokens",
        level_dim="channels of a level's paths",
        final_dim="channels of a task's features",
        chan_embed_dim="width of the channel scores' queries and keys",
        prompt_len="prompts per task",
    ),
}
"""What may be given as `facts`."""

PUBLISHED = (
    Published("cityscapes", (128, 256, 450, 96 * 192 * 4), (1024, 2048), {"image_ratio": 0.75, "chan_nheads": 1}),
)
"""The published training, by the channels of the first stage, of a level, of a task's features, and the first stage's tokens."""

SWIN = "swin_base_patch4_window12_384"
"""The timm model whose kind the backbone is; its sizes are the checkpoint's."""

RULES = (
    ("backbone.prompts", "backbone.task_prompts"),
    ("backbone.stages.{s}.{k}.{w}", "backbone.layers.{s}.blocks.{k}.{w}"),
    ("backbone.merging.{s}.{w}", "backbone.layers.{s}.downsample.{w}"),
    ("backbone.patch_embed.{w}", "backbone.patch_embed.{w}"),
    ("backbone.norm.{w}", "backbone.norm.{w}"),
    ("decoder.levels.{s}.tasks.{t}.spatial.{w}", "backbone.fea_decode_spa.{s}.{t}.0.{w}"),
    ("decoder.levels.{s}.tasks.{t}.channel.{w}", "backbone.fea_decode_chan.{s}.{t}.0.{w}"),
    ("decoder.levels.{s}.tasks.{t}.fuse.{w}", "backbone.fea_fuse.{s}.{t}.{w}"),
    ("decoder.project.{t}.{w}", "backbone.multi_scale_fuse.{t}.{w}"),
    ("heads.{t}.6.{w}", "heads.{t}.linear_pred.{w}"),
    ("heads.{t}.{w}", "heads.{t}.mt_proj.{w}"),
)
"""Our name and theirs, see `pamm.official.names`."""

DETECTION = "3ddet"
"""The task that is left out; its prompt stays, since the others' attention reads it."""

UNUSED = {
    r"backbone\.layers\.\d+\.blocks\.\d+\.(attn_mask|attn\.relative_position_index)": "a function of the sizes, computed anew",
    rf"(backbone\.(fea_\w+\.\d+|multi_scale_fuse)|heads)\.{DETECTION}\..+": "3-D detection is not among the tasks here",
}
"""Pattern of their keys → why the network needs none of them."""

log = logging.getLogger(__name__)


def matches(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a TaskPrompter on a Swin Transformer."""
    return "backbone.task_prompts" in state and any(key.startswith("backbone.layers.") for key in state)


def read(state: Mapping[str, Tensor], *, facts: Facts, **sizes: tuple[int, int] | None) -> MultiTaskModel:
    """The network with these weights and its `load_report`. Arguments and errors: see `pamm.official.load`."""
    shape = partial(shape_of, state, system=SYSTEM)
    embed_dim, _, patch_size, _ = shape("backbone.patch_embed.proj.weight", 4)
    tasks = list(head_channels(state, SYSTEM))
    level_width = shape(f"backbone.fea_decode_spa.0.{tasks[0]}.0.weight", 4)[0]
    width = shape(f"backbone.fea_fuse.0.{tasks[0]}.0.weight", 4)[0]
    twice, tokens = shape("backbone.layers.0.blocks.0.chan_kv.weight", 2)
    facts.settle(embed_dim, level_width, width, tokens)
    decoder = TaskPrompterConfig(
        width=width,
        level_width=level_width,
        chan_nheads=facts.need("chan_nheads"),
        use_ctr=False,
        channel_width=twice // 2,
        image_ratio=facts.need("image_ratio"),
        further_prompts=shape("backbone.task_prompts", 2)[0] - len(tasks),
    )
    if not 0 <= decoder.further_prompts <= 1:
        raise OfficialError(
            f"backbone.task_prompts: found {len(tasks) + decoder.further_prompts} prompts for the tasks {', '.join(tasks)}, "
            f"expected one each, and one of the task {DETECTION} where the checkpoint has it"
        )
    if not 0.01 <= decoder.image_ratio <= 10:
        raise OfficialError(f"image_ratio: found {decoder.image_ratio}, expected 0.01 to 10")
    backbone = inspect_backbone(state, facts, embed_dim, patch_size)
    facts.told(level_dim=level_width, final_dim=width, chan_embed_dim=twice // 2, prompt_len=1, use_ctr=False)
    report = LoadReport(SYSTEM, notices=list(facts.notices))
    stride = patch_size << (len(backbone.depths or ()) - 1)
    inner = {name: size and inner_size(size, decoder.image_ratio, stride) for name, size in sizes.items()}
    at = inner.get("checkpoint_size") or (facts.image and inner_size(facts.image, decoder.image_ratio, stride))
    if at and sizes.get("checkpoint_size") is None and at[0] * at[1] != tokens * patch_size**2:
        at = None
    told = len(report.notices)
    old, new = grids(tokens, patch_size, inner.get("image_size"), at, report.notices)
    for notice in report.notices[told:]:
        log.warning(notice)
    height, width = (round(side * patch_size / decoder.image_ratio) for side in new)
    image_size = sizes.get("image_size") or (height, width)
    config = ModelConfig(backbone, decoder)
    return finish(report, state, config, image_size, table, UNUSED, lambda used: on_grid(state, used, old, new))


def inner_size(size: tuple[int, int], ratio: float, stride: int) -> tuple[int, int]:
    """Height and width of an image after its resizing, pixels."""
    height, width = (max(1, round(side * ratio / stride)) * stride for side in size)
    return height, width


def inspect_backbone(state: Mapping[str, Tensor], facts: Facts, embed_dim: int, patch_size: int) -> BackboneConfig:
    """The Swin Transformer, from shapes. Raises OfficialError."""
    count = len(numbers_of(state, r"backbone\.layers\.(\d+)\..+"))
    depths = tuple(len(numbers_of(state, rf"backbone\.layers\.{s}\.blocks\.(\d+)\..+")) for s in range(count))
    table = "backbone.layers.{}.blocks.0.attn.relative_position_bias_table"
    tables = [shape_of(state, table.format(s), 2, SYSTEM) for s in range(count)]
    heads, window = tuple(heads for _, heads in tables), max((math.isqrt(rows) + 1) // 2 for rows, _ in tables)
    mlp = shape_of(state, "backbone.layers.0.blocks.0.mlp.fc1.weight", 2, SYSTEM)[0]
    facts.told(embed_dim=embed_dim, depths=depths, heads=heads, window=window)
    return BackboneConfig(
        name=SWIN,
        pretrained=False,
        out_indices=tuple(range(count)),
        patch_size=patch_size,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=heads,
        window_size=window,
        mlp_ratio=mlp / embed_dim,
    )


def table(own: Mapping[str, Tensor], tasks: list[str]) -> dict[str, Place]:
    """Their key → its place in a network with these tensors. A pure function of our names."""
    return places(own, tasks, RULES)


def on_grid(
    state: Mapping[str, Tensor], used: Mapping[str, Place], old: tuple[int, int], new: tuple[int, int]
) -> dict[str, Tensor]:
    """Their tensors, those tied to the maps' sizes resized; `old` and `new` are the first stage's rows and columns."""
    found = dict(state)
    for key in used if old != new else ():
        stage = int(key.split(".")[2]) if key.startswith("backbone.layers.") else 0
        sizes = [(rows >> stage, columns >> stage) for rows, columns in (old, new)]
        if key.endswith(".chan_kv.weight"):
            found[key] = resize_pixels(found[key], *sizes)
        elif key.endswith(".relative_position_bias_table"):
            side = (math.isqrt(len(found[key])) + 1) // 2
            window = min(side, *sizes[1])  # a smaller map has smaller windows, whose offsets lie in the middle
            cut = slice(side - window, side + window - 1)
            found[key] = found[key].unflatten(0, (2 * side - 1, -1))[cut, cut].flatten(0, 1)
    return found
