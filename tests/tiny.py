"""A tiny network and experiment, small enough for every test."""

from __future__ import annotations

from dataclasses import replace

from pamm.config.experiment import (
    BackboneConfig,
    DataConfig,
    Experiment,
    ExpertsConfig,
    ModelConfig,
    MTMambaConfig,
    PAMMConfig,
    TaskConfig,
    TrainConfig,
)
from pamm.config.peers import InvPTConfig, MLoREConfig, TaskPrompterConfig

BACKBONE = BackboneConfig("vit_tiny_patch16_224", False, (0, 1), 0.2, patch_size=8, embed_dim=32, depth=2, num_heads=2)
DECODER = PAMMConfig(width=64, state_size=4, experts=ExpertsConfig(count=5, top_k=3, rank=2))
MODEL = ModelConfig(BACKBONE, DECODER)

SWIN = BackboneConfig(
    "swin_tiny_patch4_window7_224",
    False,
    (0, 1, 2, 3),
    0.2,
    embed_dim=16,
    depths=(1, 1, 2, 1),
    num_heads=(1, 1, 2, 2),
    window_size=4,
)
MTMAMBA = MTMambaConfig(state_size=4, head_width=8, window_size=3)
MLORE = MLoREConfig(width=16, ranks=(2, 3, 4), task_rank=2, top_k=2)
INVPT = InvPTConfig(width=16, preliminary_width=12)
TASKPROMPTER = TaskPrompterConfig(width=12, level_width=8, chan_nheads=4)
PROMPTED_SWIN = TaskPrompterConfig(width=12, level_width=8, use_ctr=False, channel_width=8, image_ratio=0.75)

PEERS = {
    "mlore": ModelConfig(BACKBONE, MLORE),
    "invpt": ModelConfig(replace(BACKBONE, depth=3, out_indices=(0, 1, 2)), INVPT),
    "taskprompter": ModelConfig(replace(BACKBONE, class_token=False), TASKPROMPTER),
    "taskprompter-swin": ModelConfig(SWIN, PROMPTED_SWIN),
}
"""The systems that the papers compare themselves with, by a name."""

TASKS = {
    "semseg": TaskConfig(1.0),
    "depth": TaskConfig(1.0),
    "human_parts": TaskConfig(1.0),
    "sal": TaskConfig(1.0),
    "normals": TaskConfig(2.0),
    "edge": TaskConfig(5.0, {"positive_weight": 0.85}),
}


def experiment(root: str | None = None, **train: object) -> Experiment:
    """Six tasks on 48×64 synthetic rooms."""
    settings = {"steps": 4, "batch": 4, "lr": 1e-3, "save_every": 2, "log_every": 1, "workers": 0, "device": "cpu"}
    return Experiment(
        name="tiny",
        tasks=TASKS,
        data=DataConfig(name="synthetic", root=root, size=(48, 64), images=(12, 5)),
        model=MODEL,
        train=TrainConfig(**(settings | {"eval_every": 0} | train)),
    )
