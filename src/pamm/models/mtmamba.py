"""MTMamba, multi-task dense scene understanding with Mamba-based decoders (Lin et al.), and MTMamba++: decoder and heads.

The paper's Fig. 1 and 2 from the inside out: SS2D → MFE → STM and CTM blocks (MTMamba++: S-CTM) → stage → decoder → head.
Tasks are a batch axis: every per-task weight is one tensor whose leading dimension is the task.

Letters in shapes: B batch, T tasks, c channels of a stage, e = expand·c, h × w positions, L = h·w, K = 4 orders, N state size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pamm.config.experiment import MTMambaConfig
from pamm.config.strict import ConfigError
from pamm.models.backbone import PaddedSwinBlock
from pamm.nn.checkpointing import call, checkpointed
from pamm.nn.joined import JoinedBatchNorm2d, join_drop_paths
from pamm.nn.serialize import row_column_orders
from pamm.nn.ssm import init_A_log, init_D, init_delta_bias, init_delta_weight
from pamm.nn.task_layers import TaskConv3x3, TaskDropPath, TaskLayerNorm, TaskLinear
from pamm.nn.window_attention import WindowAttention
from pamm.ops import selective_scan

ORDERS = 4
"""Scan orders of SS2D: rows, columns, and both backwards."""

RATIO = 16
"""Channels of a stage per channel of its Δ bottleneck."""

HEAD_CHANNELS = 32
"""Channels of a stage per attention head, where windowed attention stands in for MFE or gate."""


class SS2D(nn.Module):
    """2D selective scan in four orders, each with parameters of its own, summed (paper eq. 10-12)."""

    def __init__(self, tasks: int, channels: int, rank: int, state_size: int):
        super().__init__()
        self.sizes = [rank, state_size, state_size]
        bound = 1 / math.sqrt(channels)
        self.select = nn.Parameter(torch.empty(tasks, ORDERS, sum(self.sizes), channels).uniform_(-bound, bound))
        self.delta = init_delta_weight(tasks, ORDERS, channels=channels, rank=rank)
        self.delta_bias = init_delta_bias(tasks, ORDERS, channels=channels)
        self.A_log = init_A_log(tasks, ORDERS, channels=channels, state_size=state_size)
        self.D = init_D(tasks, ORDERS, channels=channels)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """(T, B, h, w, e) → (T, B, h, w, e). Δ, B and C are made from `source`, a map like x, by default x itself."""
        tokens = (x if source is None else source).flatten(1, 3)
        chosen = torch.bmm(tokens, self.select.flatten(1, 2).mT)
        chosen = chosen.unflatten(1, (x.shape[1], -1)).unflatten(-1, (ORDERS, -1))
        low, B, C = chosen.transpose(2, 3).split(self.sizes, dim=-1)  # (T, B, K, L, ·)
        y = selective_scan(
            x.flatten(2, 3),
            low @ self.delta.mT[:, None],
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D,
            row_column_orders(*x.shape[2:4]),
            delta_bias=self.delta_bias,
        )
        return y.view(x.shape)


class MFE(nn.Module):
    """Mamba-based feature extractor: LN ∘ SS2D ∘ SiLU ∘ Conv ∘ Linear (paper eq. 13)."""

    def __init__(self, config: MTMambaConfig, tasks: int, in_features: int, channels: int):
        super().__init__()
        expanded = config.expand * channels
        self.expand = TaskLinear(tasks, in_features, expanded, bias=False)
        self.conv = TaskConv3x3(tasks, expanded)
        self.scan = SS2D(tasks, expanded, math.ceil(channels / RATIO), config.state_size)
        self.norm = TaskLayerNorm(tasks, expanded)

    def forward(self, z: Tensor, source: Tensor | None = None) -> Tensor:
        """(T, B, h, w, in_features), `source` (T, B, h, w, e) as in SS2D → (T, B, h, w, e)."""
        return self.norm(self.scan(F.silu(self.conv(self.expand(z))), source))


def attention_heads(channels: int) -> int:
    """Heads of the windowed attention of a stage: a divisor of its channels."""
    return math.gcd(channels, max(1, channels // HEAD_CHANNELS))


class WindowExtractor(nn.Module):
    """Replaces MFE in Table 3: Linear, then W-MSA at the expanded width."""

    def __init__(self, config: MTMambaConfig, tasks: int, in_features: int, channels: int):
        super().__init__()
        expanded = config.expand * channels
        self.expand = TaskLinear(tasks, in_features, expanded, bias=False)
        self.attend = WindowAttention(tasks, expanded, attention_heads(channels), config.window_size)

    def forward(self, z: Tensor, source: Tensor | None = None) -> Tensor:
        """As MFE; queries and keys, the counterparts of C and B, are made from `source`."""
        return self.attend(self.expand(z), source)


class WindowGate(nn.Module):
    """Replaces the linear gate in Table 4: W-MSA, then the Linear."""

    def __init__(self, config: MTMambaConfig, tasks: int, channels: int):
        super().__init__()
        self.attend = WindowAttention(tasks, channels, attention_heads(channels), config.window_size)
        self.linear = TaskLinear(tasks, channels, config.expand * channels, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        """(T, B, h, w, c) → (T, B, h, w, e)."""
        return self.linear(self.attend(z))


def create_extractor(config: MTMambaConfig, tasks: int, in_features: int, channels: int) -> nn.Module:
    """(T, B, h, w, in_features) → (T, B, h, w, e) of a stage with `channels` c (Table 3)."""
    return {"mamba": MFE, "attention": WindowExtractor}[config.extractor](config, tasks, in_features, channels)


def create_gate(config: MTMambaConfig, tasks: int, channels: int) -> nn.Module:
    """(T, B, h, w, c) → (T, B, h, w, e) before its activation (Table 4)."""
    if config.gate == "attention":
        return WindowGate(config, tasks, channels)
    return TaskLinear(tasks, channels, config.expand * channels, bias=False)


def concatenate(z: Tensor) -> Tensor:
    """(T, B, h, w, c) → (1, B, h, w, T·c), the features of all tasks side by side."""
    return z.permute(1, 2, 3, 0, 4).flatten(3)[None]


class STM(nn.Module):
    """Self-task Mamba block (paper Fig. 2a, eq. 14-18)."""

    def __init__(self, config: MTMambaConfig, tasks: int, channels: int, drop_path: float):
        super().__init__()
        self.norm = TaskLayerNorm(tasks, channels)
        self.extract = create_extractor(config, tasks, channels, channels)
        self.gate = create_gate(config, tasks, channels)
        self.contract = TaskLinear(tasks, config.expand * channels, channels, bias=False)
        self.drop_path = TaskDropPath(drop_path)

    def forward(self, z: Tensor, source: Tensor | None = None) -> Tensor:
        """(T, B, h, w, c) → (T, B, h, w, c); `source` (T, B, h, w, e) as in SS2D."""
        n = self.norm(z)
        return z + self.drop_path(self.contract(self.extract(n, source) * F.silu(self.gate(n))))


class TaskSwin(nn.Module):
    """A standard Swin block per task, in the place of an STM block ("2*Swin" in Table 2)."""

    def __init__(self, config: MTMambaConfig, tasks: int, channels: int, drop_path: float, *, shifted: bool):
        super().__init__()
        side, num_heads = config.window_size, attention_heads(channels)
        settings: dict[str, Any] = {"window_size": side, "shift_size": side // 2 * shifted, "drop_path": drop_path}
        whole: dict[str, Any] = {"always_partition": True, "dynamic_mask": True}  # windows keep their size on any map
        self.tasks = nn.ModuleList(
            PaddedSwinBlock(channels, side, num_heads, **settings, **whole) for _ in range(tasks)
        )
        join_drop_paths(self)

    def forward(self, z: Tensor) -> Tensor:
        """(T, B, h, w, c) → (T, B, h, w, c)."""
        return torch.stack([block(x) for block, x in zip(self.tasks, z, strict=True)])


def create_block(config: MTMambaConfig, tasks: int, channels: int, drop_path: float, number: int) -> nn.Module:
    """Block `number`, from 0, of those of a stage that keep to their task (Table 2)."""
    if config.block == "swin":
        return TaskSwin(config, tasks, channels, drop_path, shifted=number % 2 == 1)
    return STM(config, tasks, channels, drop_path)


class CTM(nn.Module):
    """Cross-task Mamba block (paper Fig. 2b, eq. 19-25), with the published code's gate: g weighs the shared feature.

    Equation 24 gives g to the task's own feature; Table 5 and the code mean g = 0 for the own and g = 1 for the shared one.
    """

    def __init__(self, config: MTMambaConfig, tasks: int, channels: int, drop_path: float):
        super().__init__()
        self.fixed = config.ctm_gate
        if self.fixed != 0:
            self.norm_shared = TaskLayerNorm(1, tasks * channels)
            self.extract_shared = create_extractor(config, 1, tasks * channels, channels)
        if self.fixed != 1:
            self.norm = TaskLayerNorm(tasks, channels)
            self.extract = create_extractor(config, tasks, channels, channels)
        if self.fixed is None:
            self.gate = create_gate(config, tasks, channels)
        self.contract = TaskLinear(tasks, config.expand * channels, channels, bias=False)
        self.drop_path = TaskDropPath(drop_path)

    def forward(self, z: Tensor) -> Tensor:
        """(T, B, h, w, c) → (T, B, h, w, c)."""
        return z + self.drop_path(self.contract(self.fuse(z)))

    def fuse(self, z: Tensor) -> Tensor:
        """g ⊙ shared + (1 − g) ⊙ own: (T, B, h, w, c) → (T, B, h, w, e). A feature of weight 0 is not computed."""
        if self.fixed != 0:
            shared = self.extract_shared(self.norm_shared(concatenate(z)))
        if self.fixed == 1:
            return shared.expand(len(z), -1, -1, -1, -1)
        n = self.norm(z)
        own = self.extract(n)
        if self.fixed == 0:
            return own
        weight = torch.sigmoid(self.gate(n)) if self.fixed is None else self.fixed
        return own + weight * (shared - own)


class SCTM(STM):
    """Cross-task block of MTMamba++: an STM block whose Δ, B and C come from one map shared by the tasks."""

    def __init__(self, config: MTMambaConfig, tasks: int, channels: int, drop_path: float):
        super().__init__(config, tasks, channels, drop_path)
        self.norm_shared = TaskLayerNorm(1, tasks * channels)
        self.share = nn.Sequential(
            nn.Conv2d(tasks * channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.cross = TaskLinear(tasks, channels, config.expand * channels, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        """(T, B, h, w, c) → (T, B, h, w, c)."""
        maps = self.norm_shared(concatenate(z))[0].permute(0, 3, 1, 2)
        shared = self.share(maps).permute(0, 2, 3, 1)
        return super().forward(z, self.cross(shared.expand(len(z), *shared.shape)))


class PatchExpand(nn.Module):
    """Twice the resolution at half the channels: Linear, 2×2 pixel shuffle, LN (paper eq. 26)."""

    def __init__(self, tasks: int, channels: int):
        super().__init__()
        self.linear = TaskLinear(tasks, channels, 2 * channels, bias=False)
        self.norm = TaskLayerNorm(tasks, channels // 2)

    def forward(self, z: Tensor) -> Tensor:
        """(T, B, h, w, C) → (T, B, 2h, 2w, C/2)."""
        parts = self.linear(z).unflatten(-1, (2, 2, -1))  # (T, B, h, w, row, column, C/2)
        return self.norm(parts.transpose(3, 4).flatten(4, 5).flatten(2, 3))


class Stage(nn.Module):
    """One decoder stage (paper eq. 26-29): patch expanding, skip connection, STM blocks, cross-task block."""

    def __init__(self, config: MTMambaConfig, tasks: int, channels: int, drop_paths: list[float]):
        super().__init__()
        self.expand = PatchExpand(tasks, 2 * channels)
        self.reduce = TaskLinear(tasks, 2 * channels, channels)
        self.stm = nn.ModuleList(create_block(config, tasks, channels, drop_paths[i], i) for i in range(config.stm))
        cross = {"mtmamba": CTM, "mtmamba++": SCTM}[config.system]
        self.ctm = cross(config, tasks, channels, drop_paths[-1]) if config.ctm else nn.Identity()

    def forward(self, z: Tensor, skip: Tensor) -> Tensor:
        """(T, B, h, w, 2c) features, (B, c, 2h, 2w) backbone map → (T, B, 2h, 2w, c)."""
        r = self.expand(z)
        skip = skip.permute(0, 2, 3, 1).expand(r.shape)
        r = self.reduce(torch.cat([r, skip], dim=-1))
        for block in self.stm:
            r = block(r)
        return self.ctm(r)


class MTMambaDecoder(nn.Module):
    """Stage maps of the backbone → one feature map per task, at the resolution of the first stage map.

    Attributes:
        grad_checkpointing: a stage's activations are computed again in the backward pass instead of kept.

    Args:
        config: settings of the decoder.
        channels: channels of the stage maps, each twice the one before it.
        tasks: names of the tasks.

    Raises:
        ConfigError: settings that do not fit together.
    """

    grad_checkpointing = False

    def __init__(self, config: MTMambaConfig, channels: tuple[int, ...], tasks: list[str]):
        super().__init__()
        check(config, channels)
        self.tasks = tasks
        self.channels = channels
        blocks = config.stm + config.ctm
        rates = torch.linspace(config.drop_path_rate, 0, blocks * (len(channels) - 1), device="cpu").tolist()
        self.stages = nn.ModuleList(
            Stage(config, len(tasks), c, rates[s * blocks : (s + 1) * blocks]) for s, c in enumerate(channels[-2::-1])
        )

    def forward(self, stages: list[Tensor]) -> dict[str, Tensor]:
        """Maps (B, c, h, w), (B, 2c, h/2, w/2), … → task name → (B, c, h, w). Raises ValueError for other shapes."""
        height, width = (side << (len(self.channels) - 1) for side in stages[-1].shape[-2:])
        expected = [(c, height >> s, width >> s) for s, c in enumerate(self.channels)]
        if [tuple(stage.shape[1:]) for stage in stages] != expected:
            raise ValueError(
                f"stage maps of shapes {[tuple(stage.shape[1:]) for stage in stages]}, expected (channels, height, width) "
                f"of {expected}: pad the image so that every stage has twice the sides of the next"
            )
        z = stages[-1].permute(0, 2, 3, 1).expand(len(self.tasks), -1, -1, -1, -1)
        run = checkpointed if self.grad_checkpointing else call
        for stage, skip in zip(self.stages, stages[-2::-1], strict=True):
            z = run(stage, z, skip)
        return dict(zip(self.tasks, z.permute(0, 1, 4, 2, 3), strict=True))

    def observe(self, maps: dict[str, Tensor]) -> list[RemovableHandle]:
        """Collect the output of every stage in each forward pass, until the returned handles are removed.

        Args:
            maps: is filled with `ctm.<s>.<t>` (B, h, w, c) for stage s and task t.

        Returns:
            Handles of the hooks.
        """

        def write(number: int) -> Callable[[nn.Module, tuple, Tensor], None]:
            return lambda module, inputs, output: maps.update(
                {f"ctm.{number}.{task}": z for task, z in zip(self.tasks, output, strict=True)}
            )

        return [stage.register_forward_hook(write(number)) for number, stage in enumerate(self.stages)]


def check(config: MTMambaConfig, channels: tuple[int, ...]) -> None:
    """Raise ConfigError for a decoder that cannot be."""
    if len(channels) < 2 or any(2 * a != b for a, b in pairwise(channels)):
        raise ConfigError(
            f"MTMamba's decoder needs two or more stages, each of twice the channels of the one before it, found channels "
            f"{list(channels)}; choose a Swin backbone and neighbouring model.backbone.out_indices, e.g. 0 1 2 3"
        )
    if config.ctm_gate is not None and config.system != "mtmamba":
        raise ConfigError(
            f"decoder.ctm_gate: found {config.ctm_gate} for {config.system}, expected none: the cross-task block of mtmamba++ "
            "has no such gate"
        )


class DenseHead(nn.Module):
    """MTMamba's head (paper §3.5): patch expanding ×4 at the same channels, then a Linear.

    The pixel shuffle comes last, when few channels are left, because norm and Linear act within a pixel.

    Args:
        channels: channels of the feature.
        out_features: channels of the logits.
    """

    def __init__(self, channels: int, out_features: int):
        super().__init__()
        self.expand = nn.Linear(channels, 16 * channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.predict = nn.Linear(channels, out_features)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, c, h, w) task feature → (B, out_features, 4h, 4w) logits."""
        parts = self.expand(feature.permute(0, 2, 3, 1)).unflatten(-1, (4, 4, -1))
        logits = self.predict(self.norm(parts))  # (B, h, w, row, column, out_features)
        return logits.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class LiteHead(nn.Sequential):
    """MTMamba++'s head: Conv3×3, BatchNorm, ReLU, Conv1×1, then bilinear ×4: (B, c, h, w) → (B, out_channels, 4h, 4w).

    Args:
        channels: channels of the feature.
        hidden: channels after the Conv3×3.
        out_channels: channels of the logits.
    """

    def __init__(self, channels: int, hidden: int, out_channels: int):
        super().__init__(
            nn.Conv2d(channels, hidden, 3, padding=1),
            JoinedBatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, out_channels, 1),
            nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False),
        )
