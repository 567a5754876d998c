"""PAMM: Parameter Aware Mamba Model for multi-task dense prediction (Yu et al.): decoder and heads.

The paper's Fig. 2 from top to bottom: Task Convolution → Parameter Aware Mamba Experts, per stage, → Task Decoder → head. Tasks are
a batch axis: every per-task weight is one tensor whose leading dimension is the task.

Letters in shapes: B batch, T tasks, S stages, d width, e = 2d expanded width, L = h·w tokens, N state size, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pamm.config.experiment import ExpertsConfig, PAMMConfig
from pamm.config.strict import ConfigError, check_choice
from pamm.nn.checkpointing import call, checkpointed
from pamm.nn.group_norm import GroupNorm
from pamm.nn.joined import JoinedBatchNorm2d
from pamm.nn.serialize import CURVES, scan_orders
from pamm.nn.ssm import init_A_log, init_D, init_delta_bias
from pamm.nn.task_layers import TaskLinear
from pamm.ops import selective_scan
from pamm.runtime.distributed import joined_draw

GROUPS = 32
"""Groups of every GroupNorm."""


class Router(nn.Module):
    """Noisy top-k routing per task and image (paper eq. 9, 11-13).

    f_r = [Pool(Linear₁ x); Linear₂ Pool(x)]: average pooling commutes with Linear₁, so both maps read one pooled vector and
    stand side by side in one matrix.
    """

    def __init__(self, tasks: int, channels: int, experts: int, top_k: int):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ConfigError(f"decoder.experts.top_k: found {top_k}, expected 1 to decoder.experts.count = {experts}")
        self.top_k = top_k
        self.project = TaskLinear(tasks, channels, 2 * (channels // 4))
        self.logits = TaskLinear(tasks, 2 * (channels // 4), experts)
        self.noise = TaskLinear(tasks, 2 * (channels // 4), experts)

    def forward(self, pooled: Tensor) -> Tensor:
        """Mean of x over the positions (T, B, e) → (T, B, E) weights: softmax, all but the k largest zero, not renormalised."""
        f_r = self.project(pooled)
        logits = F.gelu(self.logits(f_r)).float()
        if self.training:
            tasks, batch, experts = logits.shape
            draw = joined_draw(lambda n: torch.randn(n, tasks, experts, device=logits.device), batch)
            logits = logits + draw.transpose(0, 1) * self.noise(f_r)
        weights = logits.softmax(-1)
        kept = torch.zeros_like(weights).scatter_(-1, weights.topk(self.top_k, dim=-1).indices, 1.0)
        return weights * kept


class ParameterExperts(nn.Module):
    """One of the scan's parameters B or C from x: Σ_j p_j E_j(x) + the task's own linear projection (paper eq. 14-15).

    The experts are shared by the tasks, linear and of low rank, so their weighted sum is one bottleneck of E·rank channels.
    """

    def __init__(self, tasks: int, channels: int, state_size: int, config: ExpertsConfig, *, experts: bool):
        super().__init__()
        self.linear = TaskLinear(tasks, channels, state_size, bias=False)
        self.rank = config.rank
        self.router = Router(tasks, channels, config.count, config.top_k) if experts else None
        if experts:
            hidden = config.count * config.rank
            self.reduce = nn.Linear(channels, hidden, bias=False)
            bound = 1 / math.sqrt(config.rank)
            self.restore = nn.Parameter(torch.empty(hidden, state_size).uniform_(-bound, bound))

    def forward(self, x: Tensor, pooled: Tensor) -> Tensor:
        """(T, B, L, e) and its mean over the positions (T, B, e) → (T, B, L, N)."""
        y = self.linear(x)
        if self.router is None:
            return y
        weights = self.router(pooled).repeat_interleave(self.rank, -1)  # (T, B, E·rank)
        return y + (self.reduce(x) * weights[:, :, None].to(x.dtype)) @ self.restore


class ParameterPrior(nn.Module):
    """A trained vector per task, added to B or C at every position (paper eq. 16)."""

    def __init__(self, tasks: int, state_size: int):
        super().__init__()
        self.prior = nn.Parameter(torch.empty(tasks, 1, 1, state_size))
        nn.init.trunc_normal_(self.prior, std=0.02)
        self.prior._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue] (a mark that optimizers read)

    def forward(self, parameter: Tensor) -> Tensor:
        """(T, B, L, N) → (T, B, L, N)."""
        return parameter + self.prior


class TaskConvolution(nn.Module):
    """Conv3×3 and GroupNorm shared by the tasks, then a Conv3×3 per task (paper Fig. 2a)."""

    def __init__(self, channels: int, width: int, tasks: int):
        super().__init__()
        self.shared = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = GroupNorm(GROUPS, width)
        self.tasks = nn.Conv2d(width, tasks * width, 3, padding=1)
        self.width = width

    def forward(self, stage: Tensor) -> Tensor:
        """(B, C, h, w) → (B, T, d, h, w)."""
        return self.tasks(self.norm(self.shared(stage))).unflatten(1, (-1, self.width))


class SharedProjection(nn.Module):
    """Replaces Task Convolution if it is off: the stage map, projected to width d, is shared by all tasks."""

    def __init__(self, channels: int, width: int, tasks: int):
        super().__init__()
        self.project = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)
        self.tasks = tasks

    def forward(self, stage: Tensor) -> Tensor:
        """(B, C, h, w) → (B, T, d, h, w)."""
        return self.project(stage)[:, None].expand(-1, self.tasks, -1, -1, -1)


class PAME(nn.Module):
    """Parameter Aware Mamba Experts of one stage (paper Fig. 3): DWConv, gate, experts and priors on B and C, scan, skip."""

    def __init__(self, config: PAMMConfig, tasks: int):
        super().__init__()
        width, expanded, rank = config.width, 2 * config.width, math.ceil(config.width / 16)
        self.norm = GroupNorm(GROUPS * tasks, width * tasks)  # 32 groups in each task's channels
        self.dwconv = nn.Conv2d(width * tasks, width * tasks, 3, padding=1, groups=width * tasks)
        self.gate = TaskLinear(tasks, width, width)
        self.expand = TaskLinear(tasks, width, expanded)
        self.delta = nn.Sequential(
            TaskLinear(tasks, expanded, rank, bias=False), TaskLinear(tasks, rank, expanded, bias=False)
        )
        self.delta_bias = init_delta_bias(tasks, channels=expanded)
        self.A_log = init_A_log(tasks, channels=expanded, state_size=config.state_size)
        self.D = init_D(tasks, channels=expanded)
        experts, size = config.experts, config.state_size
        self.B = ParameterExperts(tasks, expanded, size, experts, experts=experts.B)
        self.C = ParameterExperts(tasks, expanded, size, experts, experts=experts.C)
        self.prior_B = ParameterPrior(tasks, size) if config.prior_B else nn.Identity()
        self.prior_C = ParameterPrior(tasks, size) if config.prior_C else nn.Identity()
        self.contract = TaskLinear(tasks, expanded, width)

    def forward(self, u: Tensor, orders: Tensor) -> Tensor:
        """(B, T, d, h, w) features, (K, L) scan orders → (B, T, d, h, w): u + project(scan) ⊙ gate."""
        n = self.norm(u.flatten(1, 2))
        local = F.silu(self.dwconv(n))
        n, local = (to_tokens(maps.unflatten(1, u.shape[1:3])) for maps in (n, local))
        z = F.silu(self.gate(n))
        x = self.expand(local)
        pooled = pool(x)
        y = selective_scan(
            x,
            self.delta(x),
            -torch.exp(self.A_log.float()),
            self.prior_B(self.B(x, pooled)),
            self.prior_C(self.C(x, pooled)),
            self.D,
            orders,
            delta_bias=self.delta_bias,
        )
        return to_maps(torch.addcmul(to_tokens(u), self.contract(y), z), u.shape[-2:])


class TaskDecoder(nn.Module):
    """Softmax over the stages, per task and position, from an MLP on all of them (paper eq. 21-22)."""

    def __init__(self, width: int, stages: int, tasks: int):
        super().__init__()
        self.mlp = nn.Sequential(TaskLinear(tasks, stages * width, width), nn.GELU(), TaskLinear(tasks, width, stages))

    def forward(self, stages: list[Tensor]) -> Tensor:
        """S maps (B, T, d, h, w) → (B, T, d, h, w)."""
        tokens = [to_tokens(stage) for stage in stages]
        weights = self.mlp(torch.cat(tokens, dim=-1)).float().softmax(-1).to(stages[0].dtype)  # (T, B, L, S)
        fused = tokens[0] * weights[..., :1]
        for s in range(1, len(tokens)):
            fused = torch.addcmul(fused, tokens[s], weights[..., s : s + 1])
        return to_maps(fused, stages[0].shape[-2:])


class ConvHead(nn.Module):
    """×4 bilinear upsampling, Conv3×3, BatchNorm, GELU, Conv1×1 (paper eq. 23).

    Args:
        width: channels of the feature.
        channels: channels of the logits.
        scale: factor of the upsampling.
        bias: whether the Conv3×3 has a bias. The BatchNorm makes it redundant, but published weights have it.
    """

    def __init__(self, width: int, channels: int, *, scale: int = 4, bias: bool = False):
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.norm = JoinedBatchNorm2d(width)
        self.predict = nn.Conv2d(width, channels, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, d, h, w) task feature → (B, channels, 4h, 4w) logits."""
        large = F.interpolate(feature, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return self.predict(F.gelu(self.norm(self.conv(large))))


class PAMMDecoder(nn.Module):
    """Stage maps of the backbone → one feature map per task (paper Fig. 2).

    Attributes:
        grad_checkpointing: a stage's activations are computed again in the backward pass instead of kept.

    Args:
        config: settings of the decoder.
        channels: channels of the stage maps.
        stages: number of stage maps S.
        tasks: names of the tasks.

    Raises:
        ConfigError: settings that do not fit together.
    """

    grad_checkpointing = False

    def __init__(self, config: PAMMConfig, channels: int, stages: int, tasks: list[str]):
        super().__init__()
        if config.width % GROUPS:
            raise ConfigError(
                f"decoder.width: found {config.width}, expected a multiple of {GROUPS} (GroupNorm's groups)"
            )
        self.tasks = tasks
        self.scan, self.orders = check_choice("decoder.scan", config.scan, CURVES), config.orders
        local = TaskConvolution if config.task_conv else SharedProjection
        self.local = nn.ModuleList(local(channels, config.width, len(tasks)) for _ in range(stages))
        self.pame = nn.ModuleList(PAME(config, len(tasks)) for _ in range(stages)) if config.pame else None
        self.fuse = TaskDecoder(config.width, stages, len(tasks)) if stages > 1 else None

    def forward(self, stages: list[Tensor]) -> dict[str, Tensor]:
        """S maps (B, C, h, w) → task name → (B, d, h, w)."""
        run = checkpointed if self.grad_checkpointing else call
        features = [run(local, stage) for local, stage in zip(self.local, stages, strict=True)]
        if self.pame is not None:
            height, width = stages[0].shape[-2:]
            orders = scan_orders(self.scan, height, width, self.orders).to(stages[0].device)
            features = [run(pame, u, orders) for pame, u in zip(self.pame, features, strict=True)]
        fused = run(self.fuse, features) if self.fuse is not None else features[0]
        return dict(zip(self.tasks, fused.unbind(1), strict=True))


def pool(x: Tensor) -> Tensor:
    """(T, B, L, e) → (T, B, e), the mean over the positions, summed in float32."""
    return x.mean(2, dtype=torch.float32).to(x.dtype)


def to_tokens(maps: Tensor) -> Tensor:
    """(B, T, d, h, w) → (T, B, L, d)."""
    return maps.flatten(3).permute(1, 0, 3, 2)


def to_maps(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """(T, B, L, d) → (B, T, d, h, w)."""
    return tokens.permute(1, 0, 3, 2).unflatten(3, size)
