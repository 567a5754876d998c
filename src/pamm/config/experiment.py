"""The schema of an experiment: a tree of frozen dataclasses, the only configuration there is.

Recipes build it, the command line overrides its leaves, and the resolved tree is written beside the weights and reloads
strictly. This file imports no torch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from pamm.config.limits import check, check_batch, check_values
from pamm.config.renamed import EARLIER_PRECISIONS, with_new_names
from pamm.config.strict import ConfigError, from_dict, to_dict
from pamm.config.strict_yaml import read_yaml
from pamm.files import replace_text, shown


@dataclass(frozen=True)
class TaskConfig:
    """One task of an experiment."""

    weight: float = 1.0
    """Multiplier of the task's loss."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the task itself: numbers, true or false, texts, lists of texts, e.g. edge: {protocol: seism}. They come before
    what the data set says of the task; `pamm train RECIPE --help` lists them."""


@dataclass(frozen=True)
class DataConfig:
    """The source of images and labels, and the size of the network's input."""

    name: str = "folder"
    """Kind of data set, by the name it is registered under: nyud, pascal, cityscapes, folder, synthetic."""
    root: str | None = None
    """Folder of the data set; `~` is expanded. Synthetic data: its cache (default: the user's cache folder)."""
    size: tuple[int, int] = (512, 512)
    """Height and width of a training crop and of the padded validation frame, pixels; multiples of the backbone's stride."""
    label_size: tuple[int, int] | None = None
    """Where set: crops and frames have this size, the network sees them shrunk to `size`, and its output is brought back to this
    size for the losses and metrics (Cityscapes: 1024×2048, seen at 512×1024)."""
    fit: bool = False
    """First shrink every image that is larger than `size` until it fits (the papers' data sets: off)."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random zoom in training."""
    flip: float = 0.5
    """Probability of mirroring a training sample."""
    largest_class: float = 0.75
    """A training crop is redrawn (10 times at most) while one class covers more than this share of its labelled pixels."""
    color: bool = True
    """Photometric distortion of training images."""
    images: tuple[int, int] = (0, 0)
    """Synthetic data: number of training and validation images."""
    seed: int = 0
    """Synthetic data: seed of the scenes."""
    val_fraction: float = 0.0
    """Folder data without val/: share of train's images that is the validation split, chosen only by their names."""

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of labels, pixels."""
        return self.label_size or self.size


@dataclass(frozen=True)
class BackboneConfig:
    """A timm vision transformer or Swin transformer. Fields left None keep timm's own value."""

    name: str = "vit_base_patch16_384.augreg_in21k_ft_in1k"
    """timm model name, with the tag of its pretrained weights after a dot; "none": stage maps come from elsewhere."""
    pretrained: bool = True
    """Start from the tag's weights (downloaded once by timm)."""
    out_indices: tuple[int, ...] = (2, 5, 8, 11)
    """ViT: blocks, counted from 0, whose outputs are the stages; the last block's output passes the final norm.
    Swin: its stages, counted from 0, whose outputs are taken, each through a norm of its own."""
    drop_path_rate: float = 0.15
    """Stochastic depth of the last block, rising linearly from 0 at the first."""
    patch_size: int | None = None
    """Patch side, pixels."""
    embed_dim: int | None = None
    """Token channels; Swin: of the first stage, doubling with every stage."""
    depth: int | None = None
    """ViT: number of blocks."""
    depths: tuple[int, ...] | None = None
    """Swin: number of blocks of every stage."""
    num_heads: int | tuple[int, ...] | None = None
    """Attention heads; Swin: of every stage."""
    window_size: int | None = None
    """Swin: side of the attention windows, tokens."""
    mlp_ratio: float | None = None
    """Hidden channels of a block's MLP per token channel."""
    class_token: bool = True
    """A class token stands in the sequence beside the image's tokens; the released PAMM has none."""


@dataclass(frozen=True)
class ExpertsConfig:
    """Parameter Experts (paper eq. 11-15)."""

    B: bool = True
    """Experts on the parameter B; off: only its linear projection (Table III)."""
    C: bool = True
    """Experts on the parameter C; off: only its linear projection (Table III)."""
    count: int = 15
    """Number of experts shared by the tasks."""
    top_k: int = 9
    """Experts kept per image and task (Table V)."""
    rank: int = 4
    """Rank of an expert."""


@dataclass(frozen=True)
class DecoderConfig:
    """Above the settings of every decoder. A subclass names its systems, e.g. `system: Literal["pamm"] = "pamm"`, as its
    first field, and `pamm.models.registry.register_decoder` registers its builder."""

    system: str
    """Which decoder these settings are of."""

    @staticmethod
    def discover() -> None:
        """Import every decoder of this package; one whose settings stand in its own file is known from then on."""
        importlib.import_module("pamm.models.registry")


@dataclass(frozen=True)
class PAMMConfig(DecoderConfig):
    """The PAMM decoder; every switch is a row of one of the paper's tables."""

    system: Literal["pamm"] = "pamm"
    """Which decoder these settings are of."""
    width: int = 768
    """Channels d of a task's features."""
    task_conv: bool = True
    """Task Convolution (Table II)."""
    pame: bool = True
    """Parameter Aware Mamba Experts (Table II)."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Parameter Experts (Tables III, V)."""
    prior_B: bool = True
    """Parameter Prior on B (Table IV)."""
    prior_C: bool = True
    """Parameter Prior on C (Table IV)."""
    state_size: int = 16
    """State size N of the selective scan."""
    scan: str = "hilbert"
    """Scan curve: hilbert, snake or morton, the H-, S- and Z-scan (Table VI); hilbert-bottom-left, the H-scan cropped as the
    paper's text has it; or another that is registered (see `pamm.nn.serialize.curve`)."""
    orders: int = 4
    """Number of scan orders (Table VIII)."""


@dataclass(frozen=True)
class MTMambaConfig(DecoderConfig):
    """The MTMamba or MTMamba++ decoder; the switches are rows of MTMamba's Tables 2-5."""

    system: Literal["mtmamba", "mtmamba++"] = "mtmamba"
    """Cross-task block and head: CTM and dense head, or S-CTM and lite head."""
    stm: int = 2
    """STM blocks per stage (Table 2)."""
    block: Literal["stm", "swin"] = "stm"
    """Kind of the STM blocks of a stage: STM, or standard Swin blocks (Table 2)."""
    ctm: bool = True
    """Cross-task block (Table 2)."""
    ctm_gate: float | None = None
    """MTMamba: fixed gate g of the CTM block, 0 for the task's own feature, 1 for the shared one (Table 5); None: learned."""
    extractor: Literal["mamba", "attention"] = "mamba"
    """Feature extractor of all blocks: the Mamba-based MFE, or attention in windows (Table 3)."""
    gate: Literal["linear", "attention"] = "linear"
    """Kind of the gates of all blocks (Table 4)."""
    window_size: int = 8
    """Side of the windows of Tables 3 and 4, positions."""
    expand: int = 2
    """Expansion factor α of the extractors."""
    state_size: int = 16
    """State size N of the selective scan."""
    drop_path_rate: float = 0.2
    """Stochastic depth of the first block, falling linearly to 0 at the last."""
    head_width: int = 96
    """MTMamba++: channels inside a head."""


@dataclass(frozen=True)
class ReleasedConfig(DecoderConfig):
    """The decoder that PAMM's published code computes (its checkpoints' shapes), where it differs from the paper."""

    system: Literal["pamm-released"] = "pamm-released"
    """Which decoder these settings are of."""
    width: int = 1024
    """Channels d of a task's features."""
    expand: int = 2
    """Channels of the scanned signal per channel of a task's features."""
    delta_rank: int | None = None
    """Rank of the step's bottleneck; None is ⌈width/16⌉."""
    state_size: int = 64
    """State size N of the selective scan."""
    shared_bias: bool = True
    """Bias of the convolution that all tasks share."""
    task_conv: bool = True
    """A convolution per task after the shared one."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Experts on B and on C."""
    kernel_size: int = 9
    """Side of the experts' kernels, tokens; odd. The published code passes its top-k setting here."""
    projection_bias: bool = False
    """Bias of the linear projection in place of B's or C's experts where those are off."""
    scan: str = "hilbert"
    """Scan curve: hilbert, snake or morton, as the published code orders them: its S-scan (snake) and Z-scan (morton) are not
    those of `pamm`; or another that is registered."""
    orders: int = 4
    """Number of scan orders; snake and morton have four."""


@dataclass(frozen=True)
class ModelConfig:
    """The network: backbone and decoder."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Image encoder."""
    decoder: DecoderConfig = field(default_factory=PAMMConfig)
    """Multi-task decoder; the field `system` selects it."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 40_000
    """Optimizer steps."""
    batch: int = 6
    """Images per optimizer step, over all devices."""
    accumulate: int = 1
    """Parts into which each device splits its share of the batch, one after the other."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam with L2 decay, or AdamW with decoupled decay."""
    lr: float = 2e-5
    """Initial learning rate."""
    weight_decay: float = 1e-6
    """Weight decay of all weights, normalisations and biases, as in the published code; the scans' A_log, D and bias of Δ and the
    Parameter Priors are exempt."""
    power: float = 0.9
    """Exponent of the poly schedule lr·(1 − step/steps)^power."""
    warmup: int = 0
    """Steps over which the learning rate first rises linearly."""
    clip: float | None = 10.0
    """Largest gradient norm."""
    scheme: Literal["sum", "log_sum"] = "sum"
    """Total loss: Σ w·L, or MTMamba's Σ w·log(L + 1e-8)."""
    eval_every: int = 1000
    """Steps between evaluations on the validation split; 0: only at the end."""
    save_every: int = 500
    """Steps between checkpoints."""
    save_minutes: float = 5.0
    """Largest age of the last checkpoint, minutes; then one is saved between `save_every` steps. 0: only by steps."""
    log_every: int = 20
    """Steps between lines of log.jsonl."""
    workers: int = 2
    """Data loading processes per device; 0 loads in the main process."""
    seed: int = 0
    """Seed of weights, sample order, augmentation and noise."""
    precision: str = "fp32"
    """Arithmetic of the forward and backward pass: fp32, bf16 or auto, which is bf16 on a CPU with units for it, else fp32.
    Weights and scan states stay float32."""
    grad_checkpointing: bool = False
    """Activation checkpointing: blocks, decoder stages and heads are computed again in the backward pass instead of kept.
    The same gradients with less memory, in more time."""
    compile: bool = False
    """Let torch.compile fuse the network; the first step takes minutes."""
    init: str | None = None
    """Fine-tuning: start from the weights of this run folder, saved model, imported checkpoint or Hub repository."""
    freeze: str | None = None
    """Fine-tuning: frozen parts, "backbone", or "backbone:N" for the patch embedding and the first N blocks."""
    backbone_lr_scale: float = 1.0
    """Learning rate of the backbone per learning rate of the rest."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    devices: int = 1
    """Processes on this node, one device each."""
    nodes: int = 1
    """Number of nodes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", EARLIER_PRECISIONS.get(self.precision, self.precision))


@dataclass(frozen=True)
class Experiment:
    """Everything that determines a run."""

    name: str = "experiment"
    """Name of the recipe; also the default run folder under runs/."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """The tasks, in order, with their loss weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data set and transforms."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimisation."""


def dump(experiment: Experiment, path: Path) -> None:
    """Write an experiment as YAML, with every default.

    Args:
        experiment: the experiment.
        path: the file, which is replaced.
    """
    replace_text(path, yaml.safe_dump(to_dict(experiment), sort_keys=False, allow_unicode=True))


def load(path: Path) -> Experiment:
    """Read an experiment from YAML, written by `dump` or by hand.

    Args:
        path: the file.

    Returns:
        The experiment.

    Raises:
        ConfigError: the file cannot be read, or holds unknown keys or wrong values.
    """
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"no experiment file at {path}; `pamm train RECIPE` writes one into its run folder") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: a path that holds NUL
        raise ConfigError(f"{shown(path, 200)} is not a readable YAML file: {shown(error, 300)}") from None
    try:
        experiment = from_dict(Experiment, with_new_names(values))
        check_values(experiment)
        return experiment
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


__all__ = [
    "BackboneConfig",
    "ConfigError",
    "DataConfig",
    "DecoderConfig",
    "Experiment",
    "ExpertsConfig",
    "MTMambaConfig",
    "ModelConfig",
    "PAMMConfig",
    "ReleasedConfig",
    "TaskConfig",
    "TrainConfig",
    "check",
    "check_batch",
    "dump",
    "load",
]
