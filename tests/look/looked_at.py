"""Small networks of every kind, and images to look at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from pamm.config.experiment import ExpertsConfig, ModelConfig, ReleasedConfig
from pamm.models.model import MultiTaskModel
from pamm.models.registry import build_model
from pamm.tasks import create_task
from tiny import BACKBONE, DECODER, MTMAMBA, SWIN

EXPERTS = ExpertsConfig(count=5, top_k=3, rank=2)
RELEASED = ReleasedConfig(width=32, state_size=4, experts=EXPERTS, kernel_size=3)
TASKS = ("semseg", "depth", "normals")
KINDS = {
    "pamm": ModelConfig(BACKBONE, DECODER),
    "pamm, experts on C alone": ModelConfig(BACKBONE, replace(DECODER, experts=replace(EXPERTS, B=False))),
    "baseline": ModelConfig(BACKBONE, replace(DECODER, task_conv=False, pame=False)),
    "one stage": ModelConfig(replace(BACKBONE, out_indices=(1,)), DECODER),
    "pamm-released": ModelConfig(replace(BACKBONE, class_token=False), RELEASED),
    "mtmamba": ModelConfig(SWIN, MTMAMBA),
    "mtmamba++": ModelConfig(SWIN, replace(MTMAMBA, system="mtmamba++")),
}
WITH_ROUTER = ("pamm", "pamm, experts on C alone", "one stage", "pamm-released")


def build(kind: str, tasks: tuple[str, ...] = TASKS) -> MultiTaskModel:
    """A network with random weights, priors, norms and routers included, in eval mode, for 64×96 images."""
    torch.manual_seed(0)
    model = build_model(KINDS[kind], {name: create_task(name) for name in tasks}, (64, 96)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: a smooth coloured picture."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
