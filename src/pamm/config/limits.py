"""Limits of an experiment's numbers and names, checked before anything is built. This file imports no torch."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from pamm.config.renamed import PRECISIONS
from pamm.config.strict import ConfigError, check_choice, to_dict
from pamm.files import shown

if TYPE_CHECKING:
    from pamm.config.experiment import Experiment, TrainConfig

MANY = 10**9

MODEL_LIMITS: dict[str, tuple[float, float]] = {
    "backbone.out_indices": (0, 127),
    "backbone.drop_path_rate": (0, 0.99),
    "backbone.patch_size": (1, 1024),
    "backbone.embed_dim": (1, 2**16),
    "backbone.depth": (1, 128),
    "backbone.depths": (1, 128),
    "backbone.num_heads": (1, 4096),
    "backbone.window_size": (1, 256),
    "backbone.mlp_ratio": (1e-3, 64),
    "decoder.width": (1, 2**16),
    "decoder.state_size": (1, 4096),
    "decoder.orders": (1, 8),
    "decoder.experts.count": (1, 4096),
    "decoder.experts.rank": (1, 4096),
    "decoder.experts.top_k": (1, 4096),
    "decoder.kernel_size": (1, 255),
    "decoder.delta_rank": (1, 2**16),
    "decoder.stm": (1, 16),
    "decoder.ctm_gate": (0, 1),
    "decoder.window_size": (1, 256),
    "decoder.expand": (1, 64),
    "decoder.head_width": (1, 2**16),
    "decoder.drop_path_rate": (0, 0.99),
    "decoder.ranks": (1, 2**16),
    "decoder.preliminary_width": (1, 2**16),
    "decoder.num_heads": (1, 4096),
    "decoder.level_width": (1, 2**16),
    "decoder.chan_nheads": (1, 4096),
    "decoder.channel_width": (1, 2**16),
    "decoder.image_ratio": (0.01, 10),
    "decoder.further_prompts": (0, 64),
    "decoder.task_rank": (1, 2**16),
    "decoder.top_k": (1, 4096),
    "decoder.load_balancing": (0, 1e9),
}
"""Leaf of a network's settings → smallest and largest value it may have, and each entry of a list; None is allowed where the
leaf's type allows it. They are wide: what one network of these sizes takes is a question of memory (see `build_model`)."""

LONGEST = 32
"""Most entries of `out_indices` and `ranks`; other lists have at most 8."""

NAME = 200
"""Most bytes of an experiment's name; a folder's has at most 255."""

LIMITS: dict[str, tuple[float, float]] = {
    "data.size": (1, 2**14),
    "data.label_size": (1, 2**14),
    "data.scale": (0.01, 100),
    "data.flip": (0, 1),
    "data.largest_class": (0, 1),
    "data.val_fraction": (0, 1),
    "data.images": (0, MANY),
    "data.seed": (0, 2**63 - 1),
    **{f"model.{leaf}": limits for leaf, limits in MODEL_LIMITS.items()},
    "train.steps": (1, MANY),
    "train.batch": (1, 10**6),
    "train.accumulate": (1, 10**6),
    "train.lr": (0, 1e300),
    "train.weight_decay": (0, 1e300),
    "train.power": (0, 1000),
    "train.warmup": (0, MANY),
    "train.clip": (1e-12, 1e12),
    "train.eval_every": (0, MANY),
    "train.save_every": (1, MANY),
    "train.save_minutes": (0, MANY),
    "train.backbone_lr_scale": (0, 1e6),
    "train.log_every": (1, MANY),
    "train.workers": (0, 1024),
    "train.seed": (0, 2**31 - 1),
    "train.devices": (1, 1024),
    "train.nodes": (1, 10**5),
}
"""As MODEL_LIMITS, of an experiment."""


def check(experiment: Experiment) -> None:
    """Check the values of an experiment.

    Args:
        experiment: the experiment.

    Raises:
        ConfigError: a name cannot be a folder's, a number is outside its range (LIMITS, a task's weight), settings exclude each
            other, or the configured processes cannot share the batch equally.
    """
    check_values(experiment)
    if experiment.data.val_fraction and experiment.data.name != "folder":
        raise ConfigError(
            f"data.val_fraction is {experiment.data.val_fraction:g}, but data sets of the kind '{experiment.data.name}' have a "
            "validation split of their own: set it to 0"
        )
    if experiment.train.compile and experiment.train.grad_checkpointing:
        raise ConfigError(
            "train.compile and train.grad_checkpointing are both on: a compiled network chooses itself what it computes "
            "again; turn one of them off"
        )
    if not STARTED_OUTSIDE & os.environ.keys():  # torchrun and SLURM have numbers of processes of their own
        check_batch(experiment.train, experiment.train.devices * experiment.train.nodes)


def check_values(experiment: Experiment) -> None:
    """As `check`, but only for names and numbers: other settings of the file may be completed or corrected later."""
    check_name(experiment.name)
    check_choice("train.precision", experiment.train.precision, [name for name in PRECISIONS if name != "fp16"])
    check_ranges(to_dict(experiment), LIMITS | {f"tasks.{name}.weight": (0, 1e9) for name in experiment.tasks})


def check_ranges(tree: dict[str, Any], limits: dict[str, tuple[float, float]]) -> None:
    """Raises ConfigError for a leaf of the tree outside its limits, or a list that is too long."""
    for leaf, (low, high) in limits.items():
        value: Any = tree
        for key in leaf.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        values = value if isinstance(value, list) else [] if value is None else [value]
        most = LONGEST if leaf.endswith(("out_indices", "ranks")) else 8
        if len(values) > most:
            raise ConfigError(f"{leaf}: found {len(values)} entries, expected at most {most}")
        for found in values:
            if not low <= found <= high:
                raise ConfigError(f"{leaf}: found {shown(found)}, expected a number from {low:g} to {high:g}")


def check_name(name: str) -> None:
    """Raises ConfigError for a name that would put the run folder, runs/NAME, elsewhere."""
    if (
        not name.isprintable()
        or re.search(r'[/\\:*?"<>|]', name)
        or name[:1] in ("", ".", "~")
        or len(name.encode()) > NAME
    ):
        raise ConfigError(
            f"name: found '{shown(name)}', expected the name of a folder under runs/: 1 to {NAME} bytes, none of "
            '/ \\ : * ? " < > |, and no dot or ~ as the first'
        )


STARTED_OUTSIDE = {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"}
"""Variables of the environment that torchrun and SLURM set."""


def check_batch(config: TrainConfig, processes: int) -> None:
    """Raises ConfigError unless the batch can be cut into equal parts for so many processes and `accumulate`."""
    parts = processes * max(1, config.accumulate)
    if config.batch >= 1 and config.accumulate >= 1 and config.batch % parts == 0:
        return
    below, above = config.batch // parts * parts, -(-config.batch // parts) * parts
    numbers = " or ".join(str(number) for number in (below, above or parts) if number > 0)
    fewer = range(min(processes - 1, 1024), 0, -1)
    fitting = next((n for n in fewer if config.batch % (n * max(1, config.accumulate)) == 0), 0)
    remedy = f", or take {fitting} device{'s' if fitting > 1 else ''} in all" if fitting else ""
    raise ConfigError(
        f"train.batch = {config.batch} cannot be shared by {processes} process{'es' if processes > 1 else ''} (train.devices × "
        f"train.nodes) in {config.accumulate} equal part{'s' if config.accumulate > 1 else ''} each (train.accumulate): set "
        f"train.batch to a multiple of {parts}, e.g. {numbers}{remedy}"
    )
