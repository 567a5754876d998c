"""Settings of the systems that PAMM and MTMamba are compared with. This file imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pamm.config.experiment import DecoderConfig


@dataclass(frozen=True)
class MLoREConfig(DecoderConfig):
    """The MLoRE decoder, as its published code computes it."""

    system: Literal["mlore"] = "mlore"
    """Which decoder these settings are of."""
    width: int = 452
    """Channels d of a task's features."""
    ranks: tuple[int, ...] = tuple(range(16, 129, 8))
    """Rank of every expert that the tasks share."""
    task_rank: int = 72
    """Rank of a task's own path."""
    top_k: int = 9
    """Experts kept per image and task."""
    pre_softmax: bool = False
    """The softmax follows the choice of experts, so that the kept weights sum to 1; else it precedes it."""
    load_balancing: float = 3e-4
    """Weight of the load-balancing loss."""


@dataclass(frozen=True)
class InvPTConfig(DecoderConfig):
    """The InvPT decoder, as its published code computes it."""

    system: Literal["invpt"] = "invpt"
    """Which decoder these settings are of."""
    width: int = 576
    """Channels of a task's features in the first stage; the next have half and a quarter of it."""
    preliminary_width: int = 512
    """Channels of a task's preliminary features."""
    num_heads: int = 2
    """Attention heads of every stage."""


@dataclass(frozen=True)
class TaskPrompterConfig(DecoderConfig):
    """TaskPrompter's prompts and decoder, as its published code computes them, on a ViT or a Swin Transformer."""

    system: Literal["taskprompter"] = "taskprompter"
    """Which decoder these settings are of."""
    width: int = 350
    """Channels of a task's features."""
    level_width: int = 300
    """Channels of a level's spatial and of its channel path."""
    chan_nheads: int = 1
    """Windows in which the channel scores are made; the whole part of its root is their number along a side."""
    use_ctr: bool = True
    """Cross-task reweighting: a task's features are summed over the tasks, weighed by the prompts' scores with each other."""
    channel_width: int = 256
    """Swin: width of the channel scores' queries and keys."""
    image_ratio: float = 1.0
    """Swin: the image is first resized by it."""
    further_prompts: int = 0
    """Prompts beside those of the tasks, after them, as of a task whose head is left out."""
