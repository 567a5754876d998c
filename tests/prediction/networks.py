"""A tiny network of every system, and pictures for it."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from pamm.config.experiment import ModelConfig, MTMambaConfig, PAMMConfig, ReleasedConfig
from pamm.models.model import MultiTaskModel
from pamm.models.registry import build_model
from pamm.tasks import create_task
from tiny import BACKBONE, MTMAMBA, PEERS, SWIN, TASKS

SYSTEMS = {
    "pamm": ModelConfig(BACKBONE, PAMMConfig(width=32, state_size=4)),
    "pamm-released": ModelConfig(BACKBONE, ReleasedConfig(width=32, state_size=4)),
    "mtmamba": ModelConfig(SWIN, MTMAMBA),
    "mtmamba++": ModelConfig(SWIN, MTMambaConfig(system="mtmamba++", state_size=4, head_width=8, window_size=3)),
    **PEERS,
}


def create(system: str, seed: int = 0) -> MultiTaskModel:
    """A network with random weights, in eval mode, for images of 64×64 pixels."""
    torch.manual_seed(seed)
    tasks = {name: create_task(name, **config.options) for name, config in TASKS.items()}
    return build_model(SYSTEMS[system], tasks, (64, 64)).eval()


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth coloured picture with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)
