"""Named experiments. Each is a function; each derives from another what it shares with it. This file imports no torch.

A name may be followed by variants: `pascal-pamm-b+no-priors` is the row "no priors" of the paper's Table IV, and
`pascal-pamm-b+s-scan+stages-2` combines two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches

from pamm.experiment import (
    BackboneConfig,
    ConfigError,
    DataConfig,
    Experiment,
    ModelConfig,
    PAMMConfig,
    ReleasedConfig,
    TaskConfig,
    TrainConfig,
)

RECIPES: dict[str, Callable[[], Experiment]] = {}
"""Recipe name → function that builds it."""

VIT_B = BackboneConfig()
VIT_L = BackboneConfig(name="vit_large_patch16_384.augreg_in21k_ft_in1k", taps=(6, 12, 18, 24))


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
def demo() -> Experiment:
    """A small PAMM from random weights on synthetic rooms, six tasks, minutes on two CPU cores."""
    return Experiment(
        tasks={
            "semseg": TaskConfig(1.0),
            "depth": TaskConfig(1.0),
            "human_parts": TaskConfig(8.0),
            "sal": TaskConfig(4.0),
            "normals": TaskConfig(2.0),
            "edge": TaskConfig(10.0, {"positive_weight": 0.85}),
        },
        data=DataConfig(name="synthetic", size=(96, 128), images=(1200, 60), scale=(1.0, 1.0), color=False),
        model=ModelConfig(
            BackboneConfig("vit_tiny_patch16_224", False, (2, 4), 0.0, patch=8, width=128, depth=4, heads=4),
            PAMMConfig(width=64, state_size=8),
        ),
        train=TrainConfig(steps=600, batch=8, optimizer="adamw", lr=2e-3, weight_decay=0.05, warmup=40, eval_every=0),
    )


@recipe
def mosaic_pamm() -> Experiment:
    """A small PAMM from random weights on a folder of photographs with partial labels, six tasks, on a CPU."""
    base = demo()
    return replace(
        base,
        tasks={
            **base.tasks,
            "human_parts": TaskConfig(2.0),
            "sal": TaskConfig(2.0),
            "edge": TaskConfig(10.0, {"positive_weight": 0.95}),
        },
        data=DataConfig(name="folder", root="../shared/data/mosaic", size=(160, 160), fit=True, scale=(0.75, 1.5)),
        train=replace(base.train, steps=2000, lr=1e-3, warmup=100, eval_every=250),
    )


def _decoder(**changes: object) -> Callable[[Experiment], Experiment]:
    return lambda e: replace(e, model=replace(e.model, decoder=replace(e.model.decoder, **changes)))


def _experts(**changes: object) -> Callable[[Experiment], Experiment]:
    return lambda e: _decoder(experts=replace(e.model.decoder.experts, **changes))(e)


def _stages(count: int) -> Callable[[Experiment], Experiment]:
    """The last `count` stages, as in Table VII."""
    return lambda e: replace(
        e, model=replace(e.model, backbone=replace(e.model.backbone, taps=e.model.backbone.taps[-count:]))
    )


VARIANTS: dict[str, tuple[str, Callable[[Experiment], Experiment]]] = {
    "baseline": ("backbone and Task Decoder alone (Table II)", _decoder(task_conv=False, pame=False)),
    "task-conv": ("Task Convolution without PAME (Table II)", _decoder(pame=False)),
    "pame": ("PAME without Task Convolution", _decoder(task_conv=False)),
    "experts-b": ("Parameter Experts on B alone (Table III)", _experts(C=False)),
    "experts-c": ("Parameter Experts on C alone (Table III)", _experts(B=False)),
    "no-experts": ("linear projections in place of the experts (Table III)", _experts(B=False, C=False)),
    "prior-b": ("Parameter Prior on B alone (Table IV)", _decoder(prior_C=False)),
    "prior-c": ("Parameter Prior on C alone (Table IV)", _decoder(prior_B=False)),
    "no-priors": ("no Parameter Priors (Table IV)", _decoder(prior_B=False, prior_C=False)),
    **{f"top-{k}": (f"{k} of 15 experts (Table V)", _experts(top_k=k)) for k in (1, 3, 5, 7, 11, 13, 15)},
    "s-scan": ("snake scan (Table VI)", _decoder(scan="snake")),
    "z-scan": ("Morton scan (Table VI)", _decoder(scan="morton")),
    **{f"stages-{n}": (f"the last {n} of the stages (Table VII)", _stages(n)) for n in (1, 2, 3)},
    **{f"orders-{n}": (f"{n} scan orders (Table VIII)", _decoder(orders=n)) for n in (1, 2)},
}
"""Variant name → (what it changes, derivation)."""


def get_recipe(name: str) -> Experiment:
    """The experiment called `name`, e.g. "demo" or "pascal-pamm-b+no-priors". Raises ConfigError naming the nearest."""
    base, *variants = name.split("+")
    if base not in RECIPES:
        raise ConfigError(f"unknown recipe '{base}'.{_nearest(base, RECIPES)} Known recipes: {', '.join(RECIPES)}")
    experiment = RECIPES[base]()
    for variant in variants:
        if variant not in VARIANTS:
            raise ConfigError(f"unknown variant '{variant}'.{_nearest(variant, VARIANTS)} Known: {', '.join(VARIANTS)}")
        try:
            experiment = VARIANTS[variant][1](experiment)
        except TypeError:  # a setting that this decoder does not have
            system = experiment.model.decoder.system
            raise ConfigError(f"the variant '{variant}' changes a setting that '{system}' does not have") from None
    return replace(experiment, name=name)


def _nearest(name: str, known: dict) -> str:
    near = get_close_matches(name, known, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
