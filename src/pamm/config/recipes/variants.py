"""Variants of the recipes: rows of the papers' tables that change one setting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches

from pamm.config.experiment import Experiment, MTMambaConfig, PAMMConfig, ReleasedConfig
from pamm.config.strict import ConfigError


def _decoder(**changes: object) -> Callable[[Experiment], Experiment]:
    return lambda e: replace(e, model=replace(e.model, decoder=replace(e.model.decoder, **changes)))


def _experts(**changes: object) -> Callable[[Experiment], Experiment]:
    def changed(e: Experiment) -> Experiment:
        assert isinstance(e.model.decoder, PAMMConfig | ReleasedConfig)
        return _decoder(experts=replace(e.model.decoder.experts, **changes))(e)

    return changed


def _stages(count: int) -> Callable[[Experiment], Experiment]:
    """The last `count` stages, as in Table VII."""
    return lambda e: replace(
        e, model=replace(e.model, backbone=replace(e.model.backbone, out_indices=e.model.backbone.out_indices[-count:]))
    )


def _swin(name: str) -> Callable[[Experiment], Experiment]:
    return lambda e: replace(e, model=replace(e.model, backbone=replace(e.model.backbone, name=name)))


Variants = dict[str, tuple[str, Callable[[Experiment], Experiment]]]

VARIANTS: Variants = {
    "baseline": ("only backbone and Task Decoder (Table II)", _decoder(task_conv=False, pame=False)),
    "task-conv": ("Task Convolution without PAME (Table II)", _decoder(pame=False)),
    "pame": ("PAME without Task Convolution", _decoder(task_conv=False)),
    "experts-b": ("Parameter Experts only on B (Table III)", _experts(C=False)),
    "experts-c": ("Parameter Experts only on C (Table III)", _experts(B=False)),
    "no-experts": ("linear projections in place of the experts (Table III)", _experts(B=False, C=False)),
    "prior-b": ("Parameter Prior only on B (Table IV)", _decoder(prior_C=False)),
    "prior-c": ("Parameter Prior only on C (Table IV)", _decoder(prior_B=False)),
    "no-priors": ("no Parameter Priors (Table IV)", _decoder(prior_B=False, prior_C=False)),
    **{f"top-{k}": (f"{k} of 15 experts (Table V)", _experts(top_k=k)) for k in (1, 3, 5, 7, 11, 13, 15)},
    "s-scan": ("snake scan (Table VI)", _decoder(scan="snake")),
    "z-scan": ("Morton scan (Table VI)", _decoder(scan="morton")),
    **{f"stages-{n}": (f"the last {n} of the stages (Table VII)", _stages(n)) for n in (1, 2, 3)},
    **{f"orders-{n}": (f"{n} scan orders (Table VIII)", _decoder(orders=n)) for n in (1, 2)},
}
"""Variant of a PAMM recipe → (what it changes, derivation)."""

MTMAMBA_VARIANTS: Variants = {
    "stm-1": ("one STM block per stage, no CTM (Table 2)", _decoder(stm=1, ctm=False)),
    "stm-2": ("two STM blocks per stage, no CTM (Table 2)", _decoder(ctm=False)),
    "stm-3": ("three STM blocks per stage, no CTM (Table 2)", _decoder(stm=3, ctm=False)),
    "swin-blocks": ("two Swin blocks per stage, no CTM (Table 2)", _decoder(block="swin", window_size=12, ctm=False)),
    "attention": ("attention in windows in place of the Mamba extractors (Table 3)", _decoder(extractor="attention")),
    "attention-gate": ("gates made by attention in windows (Table 4)", _decoder(gate="attention")),
    "gate-0": ("CTM gate fixed to 0: each task's own feature (Table 5)", _decoder(ctm_gate=0.0)),
    "gate-1": ("CTM gate fixed to 1: the shared feature (Table 5)", _decoder(ctm_gate=1.0)),
    "swin-t": ("Swin-T (Table 6)", _swin("swin_tiny_patch4_window7_224.ms_in22k_ft_in1k")),
    "swin-s": ("Swin-S (Table 6)", _swin("swin_small_patch4_window7_224.ms_in22k_ft_in1k")),
    "swin-b": ("Swin-B (Table 6)", _swin("swin_base_patch4_window12_384.ms_in22k_ft_in1k")),
}
"""Variant of an MTMamba or MTMamba++ recipe → (what it changes, derivation)."""


def variants_of(experiment: Experiment) -> Variants:
    """The variants that the experiment's decoder has; none of the systems that the papers are compared with."""
    if isinstance(experiment.model.decoder, MTMambaConfig):
        return MTMAMBA_VARIANTS
    return VARIANTS if isinstance(experiment.model.decoder, PAMMConfig | ReleasedConfig) else {}


def with_variants(experiment: Experiment, variants: Sequence[str], base: str) -> Experiment:
    """The variants of these names, one after the other, of an experiment called `base`. Raises ConfigError."""
    known = variants_of(experiment)
    for variant in variants:
        if variant not in known:
            raise ConfigError(
                f"unknown variant '{variant}' of '{base}'.{nearest(variant, known)} Known: {', '.join(known) or 'none'}"
            )
        try:
            changed = known[variant][1](experiment)
        except TypeError:  # a setting that this decoder does not have
            system = experiment.model.decoder.system
            raise ConfigError(f"the variant '{variant}' changes a setting that '{system}' does not have") from None
        if changed == experiment:
            raise ConfigError(f"the variant '{variant}' changes nothing in '{base}': it is so already")
        experiment = changed
    return experiment


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the known name nearest to `name`, if one is near."""
    near = get_close_matches(name, known, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
