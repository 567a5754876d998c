"""Checkpoints of the published InvPT: their names, what their keys and shapes tell, and what they do not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from pamm.config.experiment import ModelConfig
from pamm.config.peers import InvPTConfig
from pamm.models.model import MultiTaskModel
from pamm.official.facts import Fact, Facts, Published, shape_facts
from pamm.official.names import OfficialError, Place, places
from pamm.official.vit import VIT_FACTS, head_channels, inspect_vit, read_vit, shape_of, vit_config

SYSTEM = "invpt"

FACTS = (
    VIT_FACTS
    | shape_facts(
        embed_dim="channels of the vision transformer",
        depth="its blocks",
        preliminary_dim="channels of the preliminary features",
        prediction_dim="channels beside them in the decoder's first stage",
        decoder_dims="channels of the decoder's stages",
    )
    | {"decoder_heads": Fact(int, "attention heads of the decoder's stages")}
)
"""What may be given as `facts`."""

PUBLISHED = (
    Published("pascal", (1024, 576, 1024), (512, 512), {"num_heads": 16}),
    Published("nyud", (1024, 576, 1008), (448, 576), {"num_heads": 16}),
)
"""The published trainings, by the channels of the vision transformer and of the decoder's first stage and the tokens."""

_D = "multi_task_decoder"
_BLOCK = f"{_D}.invpt.invpt_stages.{{s}}.blocks.0"
_STAGE = (
    ("norm1.{w}", "norm1.{w}"),
    ("norm2.{w}", "norm2.{w}"),
    ("mlp.0.{w}", "mlp.fc1.{w}"),
    ("mlp.2.{w}", "mlp.fc2.{w}"),
    ("attend.query.{w}", "attn.proj_q.{w}"),
    ("attend.key.{w}", "attn.proj_k.{w}"),
    ("attend.value.{w}", "attn.proj_v.{w}"),
    ("attend.project.{w}", "attn.proj.{w}"),
    ("attend.fuse.{w}", "attn.fuse_attn.{w}"),
)
RULES = (
    ("backbone.vit.{w}", "backbone.{w}"),
    ("decoder.preliminary.{t}.decode.0.{w}", f"{_D}.preliminary_decoder.{{t}}.0.conv.{{w}}"),
    ("decoder.preliminary.{t}.decode.1.{w}", f"{_D}.preliminary_decoder.{{t}}.0.bn1.{{w}}"),
    ("decoder.preliminary.{t}.decode.3.{w}", f"{_D}.preliminary_decoder.{{t}}.1.conv.{{w}}"),
    ("decoder.preliminary.{t}.decode.4.{w}", f"{_D}.preliminary_decoder.{{t}}.1.bn1.{{w}}"),
    ("decoder.preliminary.{t}.predict.{w}", f"{_D}.intermediate_head.{{t}}.{{w}}"),
    ("decoder.preliminary.{t}.mix.{w}", f"{_D}.invpt.mix_proj.{{t}}.0.{{w}}"),
    ("decoder.skip_2.{w}", f"{_D}.scale_embed.0.{{w}}"),
    ("decoder.skip_1.{w}", f"{_D}.scale_embed.1.{{w}}"),
    *((f"decoder.stages.{{s}}.{ours}", f"{_BLOCK}.{theirs}") for ours, theirs in _STAGE),
    ("decoder.stages.{s}.attend.reduce.{t}.0.{w}", f"{_BLOCK}.attn.conv_proj_q.{{t}}.conv.{{w}}"),
    ("decoder.stages.{s}.attend.reduce.{t}.1.{w}", f"{_BLOCK}.attn.conv_proj_q.{{t}}.bn.{{w}}"),
    ("decoder.stages.{s}.embed.{t}.{w}", f"{_D}.invpt.invpt_stages.{{s}}.patch_embed.{{t}}.proj.{{w}}"),
    ("decoder.norms.{s}.{w}", f"{_D}.invpt.norm_mts.{{s}}.{{w}}"),
    ("decoder.widen.0.{t}.{w}", f"{_D}.invpt.redu_chan.1.{{t}}.{{w}}"),
    ("decoder.widen.1.{t}.{w}", f"{_D}.invpt.redu_chan.2.{{t}}.{{w}}"),
    ("decoder.project.{t}.{w}", f"{_D}.invpt.mt_proj.{{t}}.{{w}}"),
    ("heads.{t}.{w}", "heads.{t}.linear_pred.{w}"),
)
"""Our name and theirs, see `pamm.official.names`. Where theirs numbers the tasks, `numbered` puts the number."""

NUMBERED = ("conv_proj_q", "patch_embed", "redu_chan.1", "redu_chan.2")
"""What comes before a task's number in their names."""

UNUSED = {
    r"multi_task_decoder\.scale_embed\.2\..+": "a skip that no stage reads",
    r"multi_task_decoder\.invpt\.norm_mt\..+": "a norm that is never run",
    r"multi_task_decoder\.invpt\.redu_chan\.0\..+": "the first stage is added as it is",
    r"multi_task_decoder\.invpt\.invpt_stages\.0\.blocks\.0\.attn\.fuse_attn\..+": "the first stage has no scores to fuse",
}
"""Pattern of their keys → why the network needs none of them."""


def table(own: Mapping[str, Tensor], tasks: list[str]) -> dict[str, Place]:
    """Their key → its place in a network with these tensors. A pure function of our names and shapes."""
    return {numbered(key, tasks): place for key, place in places(own, tasks, RULES).items()}


def numbered(key: str, tasks: list[str]) -> str:
    """Their key, with the number of a task in the place of its name where they have it."""
    for number, task in enumerate(tasks):
        for before in NUMBERED:
            key = key.replace(f".{before}.{task}.", f".{before}.{number}.")
    return key


def matches(state: Mapping[str, Tensor]) -> bool:
    """Whether these are an InvPT's tensors."""
    return any(key.startswith("multi_task_decoder.invpt.") for key in state)


def read(state: Mapping[str, Tensor], *, facts: Facts, **sizes: tuple[int, int] | None) -> MultiTaskModel:
    """The network with these weights and its `load_report`. Arguments and errors: see `pamm.official.load`."""
    layout = inspect_vit(state, SYSTEM)
    task = next(iter(head_channels(state, SYSTEM)))
    shape = partial(shape_of, state, system=SYSTEM)
    width = shape(f"{_D}.invpt.mix_proj.{task}.0.weight", 4)[0]
    preliminary = shape(f"{_D}.preliminary_decoder.{task}.1.conv.weight", 4)[0]
    num_heads = shape(f"{_BLOCK.format(s=1)}.attn.fuse_attn.weight", 4)[0]
    facts.settle(layout.embed_dim, width, layout.tokens)
    facts.told(
        preliminary_dim=preliminary,
        prediction_dim=width - preliminary,
        decoder_dims=(width, width // 2, width // 4),
        decoder_heads=num_heads,
    )
    if width < 4 or preliminary > width:
        raise OfficialError(f"the decoder's width is {width}, that of the preliminary features {preliminary}: damaged")
    decoder = InvPTConfig(width=width, preliminary_width=preliminary, num_heads=num_heads)
    config = ModelConfig(vit_config(layout, facts, 4, class_token=True), decoder)
    return read_vit(state, facts, config, layout.tokens, table, unused=UNUSED, sizes=sizes, notices=[])
