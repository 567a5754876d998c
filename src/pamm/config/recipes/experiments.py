"""Named experiments. Each is a function; each derives from another what it shares with it. This file imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pamm.config.experiment import (
    BackboneConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    MTMambaConfig,
    PAMMConfig,
    ReleasedConfig,
    TaskConfig,
    TrainConfig,
)

RECIPES: dict[str, Callable[[], Experiment]] = {}
"""Recipe name → function that builds it."""

VIT_B = BackboneConfig()
VIT_L = BackboneConfig(name="vit_large_patch16_384.augreg_in21k_ft_in1k", out_indices=(5, 11, 17, 23))


SWIN_L = BackboneConfig("swin_large_patch4_window12_384.ms_in22k_ft_in1k", out_indices=(0, 1, 2, 3), drop_path_rate=0.1)


def recipe(build: Callable[[], Experiment]) -> Callable[[], Experiment]:
    """Register a recipe under its function's name, with dashes."""
    RECIPES[build.__name__.replace("_", "-")] = build
    return build


@recipe
def pascal_pamm_b() -> Experiment:
    """PAMM on PASCAL-Context, ViT-B/16, 512×512, five tasks (paper Table I: 79.12 67.83 85.25 13.40 73.40)."""
    return Experiment(
        tasks={
            "semseg": TaskConfig(1.0),
            "human_parts": TaskConfig(2.0),
            "sal": TaskConfig(5.0),
            "normals": TaskConfig(10.0),
            "edge": TaskConfig(50.0, {"positive_weight": 0.95}),
        },
        data=DataConfig(name="pascal", root="~/data/PASCALContext", size=(512, 512)),
        model=ModelConfig(VIT_B, PAMMConfig(width=768, state_size=64)),
        train=TrainConfig(lr=2e-5, eval_every=5000),
    )


@recipe
def pascal_pamm_l() -> Experiment:
    """PAMM on PASCAL-Context, ViT-L/16, 512×512, five tasks (paper Table I: 81.38 70.39 84.51 13.36 75.30)."""
    return replace(pascal_pamm_b(), model=ModelConfig(VIT_L, PAMMConfig(width=1024, state_size=64)))


@recipe
def nyud_pamm_b() -> Experiment:
    """PAMM on NYUD-v2, ViT-B/16, 448×576, four tasks (paper Table I: 51.10 0.5349 18.90 78.00)."""
    return Experiment(
        tasks={
            "semseg": TaskConfig(1.0),
            "depth": TaskConfig(1.0),
            "normals": TaskConfig(10.0),
            "edge": TaskConfig(50.0, {"positive_weight": 0.88}),
        },
        data=DataConfig(name="nyud", root="~/data/NYUDv2", size=(448, 576)),
        model=ModelConfig(VIT_B, PAMMConfig(width=768, state_size=16)),
        train=TrainConfig(lr=1e-5, eval_every=2000),
    )


@recipe
def nyud_pamm_l() -> Experiment:
    """PAMM on NYUD-v2, ViT-L/16, 448×576, four tasks (paper Table I: 56.63 0.5102 18.52 78.10)."""
    return replace(nyud_pamm_b(), model=ModelConfig(VIT_L, PAMMConfig(width=768, state_size=16)))


@recipe
def pascal_pamm_released_l() -> Experiment:
    """PAMM as its published code computes it, with its checkpoint's tensors; PASCAL-Context, ViT-L/16, 512×512."""
    backbone = replace(VIT_L, class_token=False)
    return replace(pascal_pamm_l(), model=ModelConfig(backbone, ReleasedConfig(width=1024, state_size=64)))


@recipe
def nyud_pamm_released_l() -> Experiment:
    """PAMM as its published code computes it (its own NYUD-v2 settings do not run: width mended), ViT-L/16, 448×576."""
    backbone = replace(VIT_L, class_token=False)
    return replace(nyud_pamm_l(), model=ModelConfig(backbone, ReleasedConfig(width=768, state_size=16)))


@recipe
def nyud_pamm_released_b() -> Experiment:
    """As nyud-pamm-released-l with ViT-B/16, for comparisons of speed; no such network was published."""
    backbone = replace(VIT_B, class_token=False)
    return replace(nyud_pamm_b(), model=ModelConfig(backbone, ReleasedConfig(width=768, state_size=16)))


@recipe
def nyud_mtmamba() -> Experiment:
    """MTMamba on NYUD-v2, Swin-L, 448×576, four tasks (paper Table 1: 55.82 0.5066 18.63 78.70).

    Published: 8 devices of one image each, every image's losses under a logarithm of their own; here the joined batch's.
    """
    return Experiment(
        tasks={
            "semseg": TaskConfig(),
            "depth": TaskConfig(),
            "normals": TaskConfig(),
            "edge": TaskConfig(1.0, {"positive_weight": 0.95}),
        },
        data=DataConfig(name="nyud", root="~/data/NYUDv2", size=(448, 576)),
        model=ModelConfig(SWIN_L, MTMambaConfig()),
        train=TrainConfig(
            steps=50_000,
            batch=8,
            optimizer="adamw",
            lr=1e-4,
            weight_decay=1e-5,
            clip=None,
            scheme="log_sum",
            eval_every=1000,
        ),
    )


@recipe
def nyud_mtmamba_plus() -> Experiment:
    """MTMamba++ on NYUD-v2, Swin-L, 448×576, four tasks (published: 57.01 0.4818 18.27 79.40)."""
    base = nyud_mtmamba()
    return replace(
        base,
        tasks={**base.tasks, "normals": TaskConfig(10.0), "edge": TaskConfig(50.0, {"positive_weight": 0.95})},
        model=ModelConfig(SWIN_L, MTMambaConfig("mtmamba++")),
        train=replace(base.train, steps=40_000, lr=2e-5, weight_decay=1e-6, scheme="sum"),
    )


@recipe
def pascal_mtmamba() -> Experiment:
    """MTMamba on PASCAL-Context, Swin-L, 512×512, five tasks (paper Table 1: 81.11 72.62 84.14 14.14 78.80)."""
    base = nyud_mtmamba()
    return replace(
        base,
        tasks={
            "semseg": TaskConfig(),
            "human_parts": TaskConfig(),
            "sal": TaskConfig(),
            "normals": TaskConfig(),
            "edge": TaskConfig(1.0, {"positive_weight": 0.95}),
        },
        data=DataConfig(name="pascal", root="~/data/PASCALContext", size=(512, 512)),
        train=replace(base.train, eval_every=5000),
    )


@recipe
def pascal_mtmamba_plus() -> Experiment:
    """MTMamba++ on PASCAL-Context, Swin-L, 512×512, five tasks (published: 81.94 72.87 85.56 14.29)."""
    base = pascal_mtmamba()
    return replace(
        base,
        model=ModelConfig(SWIN_L, MTMambaConfig("mtmamba++")),
        train=replace(base.train, steps=40_000, lr=8e-5, weight_decay=1e-6),
    )


@recipe
def cityscapes_mtmamba() -> Experiment:
    """MTMamba on Cityscapes, Swin-L, semseg and disparity, images at 512×1024, maps at 1024×2048, no augmentation."""
    base = nyud_mtmamba()
    return replace(
        base,
        tasks={"semseg": TaskConfig(), "depth": TaskConfig()},
        data=DataConfig(
            name="cityscapes",
            root="~/data/cityscapes_all",
            size=(512, 1024),
            label_size=(1024, 2048),
            scale=(1.0, 1.0),
            flip=0.0,
            color=False,
        ),
        train=replace(base.train, steps=40_000, weight_decay=1e-6),
    )


@recipe
def cityscapes_mtmamba_plus() -> Experiment:
    """MTMamba++ on Cityscapes, as cityscapes-mtmamba."""
    return replace(cityscapes_mtmamba(), model=ModelConfig(SWIN_L, MTMambaConfig("mtmamba++")))


@recipe
def demo() -> Experiment:
    """A small PAMM from random weights on synthetic rooms, six tasks, minutes on two CPU cores."""
    return Experiment(
        tasks={
            "semseg": TaskConfig(1.0),
            "depth": TaskConfig(1.0),
            "human_parts": TaskConfig(4.0),
            "sal": TaskConfig(4.0),
            "normals": TaskConfig(2.0),
            "edge": TaskConfig(10.0, {"positive_weight": 0.85}),
        },
        data=DataConfig(name="synthetic", size=(96, 128), images=(1200, 60), scale=(1.0, 1.0), color=False),
        model=ModelConfig(
            BackboneConfig(
                "vit_tiny_patch16_224", False, (1, 3), 0.0, patch_size=8, embed_dim=128, depth=4, num_heads=4
            ),
            PAMMConfig(width=64, state_size=8),
        ),
        train=TrainConfig(
            steps=600,
            batch=8,
            optimizer="adamw",
            lr=2e-3,
            weight_decay=0.01,
            warmup=40,
            eval_every=0,
            save_every=100,
        ),
    )


@recipe
def rooms_pamm() -> Experiment:
    """The synthetic benchmark's PAMM: 4000 rooms of 128×128, six tasks, 800 steps from random weights, on a CPU."""
    base = demo()
    return replace(
        base,
        data=replace(base.data, size=(128, 128), images=(4000, 500)),
        train=replace(base.train, steps=800, batch=4, save_every=100),
    )


@recipe
def rooms_mtmamba() -> Experiment:
    """The synthetic benchmark's MTMamba: data and training of rooms-pamm, a Swin of as many tokens, as many parameters."""
    swin = BackboneConfig(
        "swin_tiny_patch4_window7_224",
        False,
        (0, 1, 2),
        0.0,
        patch_size=8,
        embed_dim=32,
        depths=(2, 2, 2),
        num_heads=(1, 2, 4),
        window_size=8,
    )
    return replace(
        rooms_pamm(), model=ModelConfig(swin, MTMambaConfig(state_size=8, drop_path_rate=0.0, head_width=64))
    )


@recipe
def rooms_mtmamba_plus() -> Experiment:
    """The synthetic benchmark's MTMamba++, as rooms-mtmamba."""
    base = rooms_mtmamba()
    return replace(base, model=replace(base.model, decoder=replace(base.model.decoder, system="mtmamba++")))


@recipe
def folder_pamm() -> Experiment:
    """A small PAMM from random weights on a folder of your own (--data.root), any of six tasks, on a CPU."""
    base = demo()
    return replace(
        base,
        tasks={
            **base.tasks,
            "human_parts": TaskConfig(2.0),
            "sal": TaskConfig(2.0),
            "edge": TaskConfig(10.0, {"positive_weight": 0.95}),
        },
        data=DataConfig(name="folder", size=(160, 160), fit=True, scale=(0.75, 1.5)),
        train=replace(base.train, steps=2000, lr=1e-3, weight_decay=0.05, warmup=100, eval_every=250),
    )


@recipe
def folder_pamm_b() -> Experiment:
    """PAMM on a folder of your own (--data.root), pretrained ViT-B/16, 512×512, any of six tasks, for a GPU."""
    return Experiment(
        tasks={
            "semseg": TaskConfig(1.0),
            "depth": TaskConfig(1.0),
            "human_parts": TaskConfig(2.0),
            "sal": TaskConfig(5.0),
            "normals": TaskConfig(10.0),
            "edge": TaskConfig(50.0, {"positive_weight": 0.95}),
        },
        data=DataConfig(name="folder", size=(512, 512), fit=True),
        model=ModelConfig(VIT_B, PAMMConfig(width=768, state_size=16)),
        train=TrainConfig(steps=10_000, lr=2e-5, eval_every=500),
    )
