"""Checkpoints of the published MLoRE: their names, what their keys and shapes tell, and what they do not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from pamm.config.experiment import ModelConfig
from pamm.config.peers import MLoREConfig
from pamm.models.model import MultiTaskModel
from pamm.official.facts import Fact, Facts, Published, shape_facts
from pamm.official.names import OfficialError, Place, places
from pamm.official.vit import (
    CLASS_ROW,
    ROUTER,
    VIT_FACTS,
    head_channels,
    inspect_vit,
    numbers_of,
    read_vit,
    shape_of,
    vit_config,
)

SYSTEM = "mlore"

FACTS = VIT_FACTS | {
    "topk": Fact(int, "experts kept per image and task", "the training's yml file; 9 in all published ones"),
    "pre_softmax": Fact(
        bool,
        "whether the softmax follows the choice of experts",
        "the training's yml file; true for NYUD-v2, false for PASCAL-Context",
    ),
    **shape_facts(
        embed_dim="channels of the vision transformer",
        depth="its blocks",
        width="channels of a task's features",
        ranks="ranks of the shared experts",
        task_rank="rank of a task's own path",
    ),
}
"""What may be given as `facts`."""

PUBLISHED = (
    Published("pascal", (1024, 452, 1024), (512, 512), {"num_heads": 16, "topk": 9, "pre_softmax": False}),
    Published("nyud", (1024, 768, 1008), (448, 576), {"num_heads": 16, "topk": 9, "pre_softmax": True}),
    Published("pascal", (768, 640, 1024), (512, 512), {"num_heads": 12, "topk": 9, "pre_softmax": False}),
    Published("pascal", (384, 192, 1024), (512, 512), {"num_heads": 6, "topk": 9, "pre_softmax": False}),
)
"""The published trainings, by the channels of the vision transformer and of a task's features and the number of tokens."""

BLOCKS = {"first": "MLoRE_1", "second": "MLoRE_2"}
"""Our name of the blocks → theirs."""

_BLOCK = (
    *((f"routers.{{t}}.{ours}", f"router_1.{{t}}.{theirs}") for ours, theirs in ROUTER),
    ("enter.{t}.{w}", "conv1.{t}.{w}"),
    ("leave.{t}.{w}", "conv3.{t}.{w}"),
    ("task_reduce.{t}.{w}", "conv2.{t}.W.{w}"),
    ("task_restore.{t}.{w}", "conv2.{t}.M.{w}"),
    ("general.{w}", "share_conv.{w}"),
    ("norm.{t}.{w}", "bn.{t}.{w}"),
    ("norm_experts.{t}.{w}", "bn_all.{t}.{w}"),
)
RULES = (
    ("backbone.vit.{w}", "backbone.{w}"),
    ("decoder.reduce.{s}.{w}", "backbone.fea_fuse.{s}.{w}"),
    *(
        (f"decoder.{own}.{{s}}.{ours}", f"backbone.{their}.{{s}}.{theirs}")
        for own, their in BLOCKS.items()
        for ours, theirs in _BLOCK
    ),
    ("decoder.fuse.{t}.{w}", "backbone.task_mask.{t}.{w}"),
    ("heads.{t}.conv.{w}", "heads.{t}.mt_proj.0.{w}"),
    ("heads.{t}.norm.{w}", "heads.{t}.mt_proj.1.{w}"),
    ("heads.{t}.predict.{w}", "heads.{t}.linear_pred.{w}"),
)
"""Our name and theirs, see `pamm.official.names`; the experts, which stand side by side here, come beside them."""

UNUSED = {
    r"backbone\.q_fuse\..+": "built and never run",
    r"backbone\.classify_route_[12](\..+)?": "built and never run",
    r"aux_heads\..+": "built and never run",
}
"""Pattern of their keys → why the network needs none of them."""


def expert_places(own: Mapping[str, Tensor], ranks: tuple[int, ...]) -> Iterator[tuple[str, Place]]:
    """Their keys of the experts, each a part of our tensors."""
    for name in own:
        match = re.fullmatch(r"decoder\.(first|second)\.(\d+)\.experts\.reduce\.weight", name)
        if match is None:
            continue
        ours = name.removesuffix("reduce.weight")
        start = 0
        for number, rank in enumerate(ranks):
            theirs = f"backbone.{BLOCKS[match[1]]}.{match[2]}.lora_list_1.{number}"
            rows = slice(start, start + rank)
            yield f"{theirs}.W.weight", Place(f"{ours}reduce.weight", rows)
            yield f"{theirs}.W.bias", Place(f"{ours}reduce.bias", rows)
            yield f"{theirs}.M.weight", Place(f"{ours}restore", (slice(None), rows))
            yield f"{theirs}.M.bias", Place(f"{ours}restore_bias", number)
            start += rank


def table(own: Mapping[str, Tensor], tasks: list[str], ranks: tuple[int, ...]) -> dict[str, Place]:
    """Their key → its place in a network with these tensors. A pure function of our names and shapes."""
    found = places({name: value for name, value in own.items() if ".experts." not in name}, tasks, RULES)
    found["backbone.pos_embed"] = replace(found["backbone.pos_embed"], skip=1)
    return found | dict(expert_places(own, ranks))


def inspect_decoder(state: Mapping[str, Tensor], facts: Facts, tasks: list[str]) -> MLoREConfig:
    """The decoder's settings, from the first block and the facts. Raises OfficialError."""
    first = "backbone.MLoRE_1.0"
    width = shape_of(state, "backbone.fea_fuse.0.weight", 4, SYSTEM)[0]
    count = len(numbers_of(state, rf"{re.escape(first)}\.lora_list_1\.(\d+)\..+"))
    ranks = tuple(shape_of(state, f"{first}.lora_list_1.{j}.W.weight", 4, SYSTEM)[0] for j in range(count))
    task_rank = shape_of(state, f"{first}.conv2.{tasks[0]}.W.weight", 4, SYSTEM)[0]
    facts.told(width=width, ranks=ranks, task_rank=task_rank)
    top_k, pre_softmax = facts.need("topk"), facts.need("pre_softmax")
    if not 1 <= top_k <= count:
        raise OfficialError(f"topk: found {top_k}, expected 1 to the number of experts, {count}")
    return MLoREConfig(width=width, ranks=ranks, task_rank=task_rank, top_k=top_k, pre_softmax=pre_softmax)


def matches(state: Mapping[str, Tensor]) -> bool:
    """Whether these are an MLoRE's tensors."""
    return any(key.startswith("backbone.MLoRE_1.") for key in state)


def read(state: Mapping[str, Tensor], *, facts: Facts, **sizes: tuple[int, int] | None) -> MultiTaskModel:
    """The network with these weights and its `load_report`. Arguments and errors: see `pamm.official.load`."""
    layout = inspect_vit(state, SYSTEM)
    facts.settle(layout.embed_dim, shape_of(state, "backbone.fea_fuse.0.weight", 4, SYSTEM)[0], layout.tokens)
    stages = len(numbers_of(state, r"backbone\.fea_fuse\.(\d+)\..+"))
    decoder = inspect_decoder(state, facts, list(head_channels(state, SYSTEM)))
    config = ModelConfig(vit_config(layout, facts, stages, class_token=False), decoder)
    return read_vit(
        state,
        facts,
        config,
        layout.tokens,
        lambda own, tasks: table(own, tasks, decoder.ranks),
        unused=UNUSED,
        sizes=sizes,
        notices=[CLASS_ROW],
    )
