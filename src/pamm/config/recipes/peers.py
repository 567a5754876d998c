"""Experiments of the systems that PAMM and MTMamba are compared with, with their published settings. No torch here."""

from __future__ import annotations

from dataclasses import replace

from pamm.config.experiment import (
    BackboneConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    TaskConfig,
    TrainConfig,
)
from pamm.config.peers import InvPTConfig, MLoREConfig, TaskPrompterConfig
from pamm.config.recipes.experiments import VIT_B, VIT_L, nyud_pamm_b, pascal_pamm_b, recipe

SWIN_B = BackboneConfig("swin_base_patch4_window12_384.ms_in22k_ft_in1k", out_indices=(0, 1, 2, 3))


def _with_edges(experiment: Experiment, positive_weight: float) -> Experiment:
    """The experiment with another weight of the boundaries' pixels."""
    edge = TaskConfig(experiment.tasks["edge"].weight, {"positive_weight": positive_weight})
    return replace(experiment, tasks={**experiment.tasks, "edge": edge})


@recipe
def pascal_invpt_l() -> Experiment:
    """InvPT on PASCAL-Context, ViT-L/16, 512×512, five tasks (released checkpoint: 79.91 68.54 84.38 13.90 72.90)."""
    base = pascal_pamm_b()
    return replace(base, model=ModelConfig(VIT_L, InvPTConfig()), train=replace(base.train, clip=None))


@recipe
def nyud_invpt_l() -> Experiment:
    """InvPT on NYUD-v2, ViT-L/16, 448×576, four tasks (released checkpoint: 53.65 0.5083 18.68 77.80)."""
    base = _with_edges(nyud_pamm_b(), 0.95)
    train = replace(base.train, lr=2e-5, clip=None, eval_every=1000)
    return replace(base, model=ModelConfig(VIT_L, InvPTConfig()), train=train)


@recipe
def pascal_taskprompter_l() -> Experiment:
    """TaskPrompter on PASCAL-Context, ViT-L/16, 512×512, five tasks (released checkpoint: 80.79 68.81 84.26 13.58 73.80)."""
    base = pascal_pamm_b()
    backbone = replace(VIT_L, class_token=False)
    return replace(base, model=ModelConfig(backbone, TaskPrompterConfig()), train=replace(base.train, batch=4))


@recipe
def pascal_taskprompter_b() -> Experiment:
    """TaskPrompter on PASCAL-Context, ViT-B/16, 512×512, five tasks (released checkpoint: 78.63 66.93 84.77 13.42 73.60)."""
    decoder = TaskPrompterConfig(width=1024, level_width=780, chan_nheads=16)
    return replace(pascal_taskprompter_l(), model=ModelConfig(replace(VIT_B, class_token=False), decoder))


@recipe
def nyud_taskprompter_l() -> Experiment:
    """TaskPrompter on NYUD-v2, ViT-L/16, 448×576, four tasks (released checkpoint: 55.90 0.5062 18.58 77.70)."""
    base = _with_edges(nyud_pamm_b(), 0.95)
    decoder = TaskPrompterConfig(width=768, level_width=768, chan_nheads=16, use_ctr=False)
    train = replace(base.train, batch=4, eval_every=1000)
    return replace(base, model=ModelConfig(replace(VIT_L, class_token=False), decoder), train=train)


@recipe
def cityscapes_taskprompter() -> Experiment:
    """TaskPrompter on Cityscapes, Swin-B, semseg and disparity, 1024×2048 (released checkpoint: 79.38 4.67).

    Published: a third task, 3-D detection, and losses on maps of 512×1024; here of 1024×2048. Its augmentation, its batch and
    its stochastic depth are not known: chosen here, without random zoom, mirroring and colours.
    """
    decoder = TaskPrompterConfig(width=450, level_width=256, use_ctr=False, image_ratio=0.75)
    data = DataConfig(
        name="cityscapes", root="~/data/cityscapes_all", size=(1024, 2048), scale=(1.0, 1.0), flip=0.0, color=False
    )
    return Experiment(
        tasks={"semseg": TaskConfig(100.0), "depth": TaskConfig(1.0)},
        data=data,
        model=ModelConfig(SWIN_B, decoder),
        train=TrainConfig(batch=4, weight_decay=0.0),
    )


@recipe
def pascal_mlore_l() -> Experiment:
    """MLoRE on PASCAL-Context, ViT-L/16, 512×512, five tasks (released checkpoint: 81.41 70.52 84.90 13.51 75.42)."""
    base = _with_edges(pascal_pamm_b(), 0.925)
    backbone = replace(VIT_L, class_token=False)
    return replace(base, model=ModelConfig(backbone, MLoREConfig()), train=replace(base.train, batch=4))


@recipe
def pascal_mlore_b() -> Experiment:
    """MLoRE on PASCAL-Context, ViT-B/16, 512×512, five tasks (released checkpoint: 79.26 67.82 85.31 13.65 74.69)."""
    decoder = MLoREConfig(width=640, task_rank=64, load_balancing=1e-4)
    model = ModelConfig(replace(VIT_B, class_token=False), decoder)
    return replace(_with_edges(pascal_mlore_l(), 0.95), model=model)


@recipe
def nyud_mlore_l() -> Experiment:
    """MLoRE on NYUD-v2, ViT-L/16, 448×576, four tasks (released checkpoint: 55.96 0.5076 18.33 78.43)."""
    base = nyud_pamm_b()
    ranks = tuple(range(16, 241, 16))
    decoder = MLoREConfig(width=768, ranks=ranks, task_rank=16, pre_softmax=True, load_balancing=5e-4)
    return replace(
        base, model=ModelConfig(replace(VIT_L, class_token=False), decoder), train=replace(base.train, batch=4)
    )
