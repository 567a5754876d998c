"""Checkpoints of the published TaskPrompter on a ViT: their names, what their keys and shapes tell, and what they do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from pamm.config.experiment import ModelConfig
from pamm.config.peers import TaskPrompterConfig
from pamm.models.model import MultiTaskModel
from pamm.nn.prompts import resize_gather, resize_spread
from pamm.official.facts import Fact, Facts, Published, shape_facts
from pamm.official.names import OfficialError, Place, places
from pamm.official.vit import CLASS_ROW, VIT_FACTS, head_channels, inspect_vit, read_vit, shape_of, vit_config

SYSTEM = "taskprompter"

FACTS = {
    **VIT_FACTS,
    "chan_nheads": Fact(
        int,
        "windows of the channel scores",
        "chan_nheads of the training's yml file; 1 for PASCAL-Context on ViT-L, 16 on ViT-B and for NYUD-v2",
    ),
    "use_ctr": Fact(bool, "whether there is cross-task reweighting"),
    **shape_facts(
        embed_dim="channels of the vision transformer",
        depth="its blocks",
        prompt_len="prompts per task",
        level_dim="channels of a level's paths",
        final_dim="channels of a task's features",
    ),
}
"""What may be given as `facts`."""

PUBLISHED = (
    Published("pascal", (1024, 300, 350, 1024), (512, 512), {"num_heads": 16, "chan_nheads": 1}),
    Published("pascal", (768, 780, 1024, 1024), (512, 512), {"num_heads": 12, "chan_nheads": 16}),
    Published("nyud", (1024, 768, 768, 1008), (448, 576), {"num_heads": 16, "chan_nheads": 16}),
)
"""The published trainings, by the channels of the vision transformer, of a level, of a task's features, and the tokens."""

LEVELS = 4

RULES = (
    ("backbone.prompts", "backbone.task_prompts"),
    ("backbone.vit.{w}", "backbone.{w}"),
    ("backbone.spread.{s}.{w}", "backbone.blocks.{s}.attn.token_trans.{w}"),
    ("backbone.gather.{s}.{w}", "backbone.blocks.{s}.attn.token_trans1.{w}"),
    ("decoder.levels.{s}.tasks.{t}.spatial.{w}", "backbone.fea_decode_spa.{s}.{t}.0.{w}"),
    ("decoder.levels.{s}.tasks.{t}.channel.{w}", "backbone.fea_decode_chan.{s}.{t}.0.{w}"),
    ("decoder.levels.{s}.tasks.{t}.fuse.{w}", "backbone.fea_fuse.{s}.{t}.{w}"),
    ("decoder.levels.{s}.cross.{t}.{w}", "backbone.ctr_attn_conv.{s}.{t}.{w}"),
    ("heads.{t}.conv.{w}", "heads.{t}.mt_proj.0.{w}"),
    ("heads.{t}.norm.{w}", "heads.{t}.mt_proj.1.{w}"),
    ("heads.{t}.predict.{w}", "heads.{t}.linear_pred.{w}"),
)
"""Our name and theirs, see `pamm.official.names`."""


def table(own: Mapping[str, Tensor], tasks: list[str]) -> dict[str, Place]:
    """Their key → its place in a network with these tensors. A pure function of our names and shapes."""
    found = places(own, tasks, RULES)
    found["backbone.pos_embed"] = replace(found["backbone.pos_embed"], skip=1)
    return found


def on_grid(
    state: Mapping[str, Tensor], used: Mapping[str, Place], old: tuple[int, int], new: tuple[int, int]
) -> dict[str, Tensor]:
    """Their tensors, those tied to the grid of tokens resized from `old` to `new` rows and columns."""
    found = dict(state)
    if old == new:
        return found
    for key in used:
        if key == "backbone.pos_embed":
            found[key] = resample_abs_pos_embed(found[key], list(new), list(old), num_prefix_tokens=1)
        elif ".token_trans." in key:
            found[key] = resize_spread(found[key], old, new)
        elif key.endswith(".token_trans1.weight"):
            found[key] = resize_gather(found[key], old, new)
    return found


def matches(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a TaskPrompter on a vision transformer."""
    return "backbone.task_prompts" in state and any(key.startswith("backbone.blocks.") for key in state)


def read(state: Mapping[str, Tensor], *, facts: Facts, **sizes: tuple[int, int] | None) -> MultiTaskModel:
    """The network with these weights and its `load_report`. Arguments and errors: see `pamm.official.load`."""
    layout = inspect_vit(state, SYSTEM)
    tasks = list(head_channels(state, SYSTEM))
    level_width = shape_of(state, f"backbone.fea_decode_spa.0.{tasks[0]}.0.weight", 4, SYSTEM)[0]
    width = shape_of(state, f"backbone.fea_fuse.0.{tasks[0]}.0.weight", 4, SYSTEM)[0]
    prompts = shape_of(state, "backbone.task_prompts", 2, SYSTEM)[0]
    if prompts != len(tasks):
        raise OfficialError(
            f"backbone.task_prompts: found {prompts} prompts for {len(tasks)} tasks, expected one each: other lengths of prompts "
            "do not run in the published code either"
        )
    facts.settle(layout.embed_dim, level_width, width, layout.tokens)
    scores = f"backbone.ctr_attn_conv.0.{tasks[0]}.0.weight"
    use_ctr, heads = scores in state, shape_of(state, scores, 4, SYSTEM)[0] if scores in state else None
    facts.told(level_dim=level_width, final_dim=width, prompt_len=1, use_ctr=use_ctr)
    decoder = TaskPrompterConfig(
        width=width, level_width=level_width, chan_nheads=facts.need("chan_nheads"), use_ctr=use_ctr
    )
    config = ModelConfig(vit_config(layout, facts, LEVELS, class_token=False, heads=heads), decoder)
    unread = rf"backbone\.blocks\.{layout.depth - 1}\.attn\.token_trans1\.(weight|bias)"
    model = read_vit(
        state,
        facts,
        config,
        layout.tokens,
        table,
        unused={unread: "the prompts that leave the last block are not read"},
        sizes=sizes,
        notices=[CLASS_ROW],
        change=on_grid,
    )
    for name in ("weight", "bias"):  # so that `intermediates` shows those prompts
        key = f"backbone.blocks.{layout.depth - 1}.attn.token_trans1.{name}"
        if key in state and model.backbone.grid[0] * model.backbone.grid[1] == layout.tokens:
            setattr(model.backbone, f"unread_{name}", state[key].float())
    return model
