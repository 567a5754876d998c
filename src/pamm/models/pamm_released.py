"""PAMM as its published code computes it: the function behind the published weights.

Where it leaves the paper (see `pamm.models.pamm` for that): the experts are 9×9 convolutions with two BatchNorms and a
general path that sends no gradient back, the router also reads a weighted sum over the positions of one token grid, A, D and
the priors are constants, no convolution precedes the scanned signal, and the S- and Z-scan turn and crop another square.

Letters in shapes: B batch, T tasks, S stages, d width, e expanded width, h×w tokens, L = h·w, N state size, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pamm.config.experiment import ReleasedConfig
from pamm.config.strict import ConfigError, check_choice
from pamm.nn.checkpointing import call, checkpointed
from pamm.nn.fusion import StageFusion
from pamm.nn.group_norm import GroupNorm
from pamm.nn.joined import JoinedBatchNorm2d
from pamm.nn.router import SpatialRouter
from pamm.nn.serialize import CURVES, MOST_ORDERS, scan_orders
from pamm.nn.ssm import init_A_log, init_D
from pamm.nn.task_layers import per_task
from pamm.ops import selective_scan

GROUPS = 32
"""Groups of every GroupNorm."""

RELEASED_CURVES = {"snake": "snake-released", "morton": "morton-released"}
"""The setting `scan` → the published code's curve, where it is another one than that of `pamm`."""


def create_linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer as the published code initialises it: trunc-normal 0.02, bias 0."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """Uniform in ±fan_in^(−1/2), as torch initialises a convolution."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class ReleasedExperts(nn.Module):
    """One of the scan's parameters B or C from x, the prior added.

    BatchNorm(BatchNorm(Σ_j p_j E_j(x)) + m·E_task(x) + G(x)), where no gradient goes back through G's x. An expert is a k×k
    convolution to `rank` channels and a 1×1 convolution from them; E_task belongs to one task, the other experts and G to
    all, the BatchNorms to one task each. Experts stand side by side, so their weighted sum is one bottleneck.
    """

    prior: Tensor

    def __init__(self, tasks: list[str], channels: int, grid: tuple[int, int], config: ReleasedConfig):
        super().__init__()
        size, kernel, rank, count = config.state_size, config.kernel_size, config.experts.rank, config.experts.count
        self.padding = kernel // 2
        self.reduce = uniform(count, rank, channels, kernel, kernel, fan_in=channels * kernel**2)
        self.reduce_bias = uniform(count, rank, fan_in=channels * kernel**2)
        self.restore = uniform(count, size, rank, fan_in=rank)
        self.restore_bias = uniform(count, size, fan_in=rank)
        self.general = nn.Conv2d(channels, size, kernel, padding=self.padding)
        self.task_reduce = per_task(tasks, lambda: nn.Conv2d(channels, rank, kernel, padding=self.padding))
        self.task_restore = per_task(tasks, lambda: nn.Conv2d(rank, size, 1))
        self.routers = per_task(tasks, lambda: SpatialRouter(channels, grid, count, config.experts.top_k))
        self.norm_experts = per_task(tasks, lambda: JoinedBatchNorm2d(size))
        self.norm = per_task(tasks, lambda: JoinedBatchNorm2d(size))
        self.register_buffer("prior", torch.zeros(len(tasks), size))

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        """T maps (B, e, h, w) → (T, B, N, h, w)."""
        maps = [self.one_task(task, *self.routers[task](x_t), x=x_t) for task, x_t in zip(self.routers, x, strict=True)]
        return torch.stack(maps) + self.prior[:, None, :, None, None]

    def one_task(self, task: str, weights: Tensor, mix: Tensor, x: Tensor) -> Tensor:
        """Routing (B, E) and (B, 1), map (B, e, h, w) → (B, N, h, w), without the prior."""
        own = self.task_reduce[task]
        assert own.bias is not None
        reduce = torch.cat([self.reduce.flatten(0, 1), own.weight])
        hidden = F.conv2d(x, reduce, torch.cat([self.reduce_bias.flatten(), own.bias]), padding=self.padding)
        shared, private = hidden.split([self.reduce_bias.numel(), len(own.bias)], dim=1)
        scale = weights.repeat_interleave(self.reduce.shape[1], 1)[:, :, None, None].to(x.dtype)
        restore = self.restore.transpose(0, 1).flatten(1)[:, :, None, None]
        bias = weights @ self.restore_bias.to(weights.dtype)
        chosen = F.conv2d(shared * scale, restore) + bias[:, :, None, None].to(x.dtype)
        mixed = mix[:, :, None, None].to(x.dtype) * self.task_restore[task](private)
        return self.norm[task](self.norm_experts[task](chosen) + mixed + self.general(x.detach()))


class PlainProjection(nn.Module):
    """Replaces the experts if they are off: a linear map per task, with the prior added."""

    prior: Tensor

    def __init__(self, tasks: list[str], channels: int, config: ReleasedConfig):
        super().__init__()
        self.project = per_task(tasks, lambda: create_linear(channels, config.state_size, bias=config.projection_bias))
        self.register_buffer("prior", torch.zeros(len(tasks), config.state_size))

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        """T maps (B, e, h, w) → (T, B, N, h, w)."""
        maps = [project(x_t.movedim(1, -1)) for project, x_t in zip(self.project.values(), x, strict=True)]
        return (torch.stack(maps) + self.prior[:, None, None, None]).movedim(-1, 2)


class ReleasedStage(nn.Module):
    """Task convolutions and the experts' scan of one stage. A_log, D and the priors are constants, saved as buffers."""

    B: nn.Module
    C: nn.Module
    A_log: Tensor
    D: Tensor

    def __init__(self, config: ReleasedConfig, channels: int, grid: tuple[int, int], tasks: list[str]):
        super().__init__()
        width, expanded = config.width, config.expand * config.width
        rank = config.delta_rank or math.ceil(width / 16)
        self.shared = nn.Conv2d(channels, width, 3, padding=1, bias=config.shared_bias)
        self.shared_norm = GroupNorm(GROUPS, width)
        self.conv = per_task(tasks, lambda: nn.Conv2d(width, width, 3, padding=1)) if config.task_conv else None
        self.norm = per_task(tasks, lambda: GroupNorm(GROUPS, width))
        self.gate = per_task(tasks, lambda: nn.Conv2d(width, width, 1))
        self.expand = per_task(tasks, lambda: nn.Conv2d(width, expanded, 1))
        self.delta_reduce = per_task(tasks, lambda: create_linear(expanded, rank, bias=False))
        self.delta_restore = per_task(tasks, lambda: create_linear(rank, expanded))
        self.B, self.C = (
            ReleasedExperts(tasks, expanded, grid, config) if experts else PlainProjection(tasks, expanded, config)
            for experts in (config.experts.B, config.experts.C)
        )
        self.contract = per_task(tasks, lambda: nn.Linear(expanded, width))
        self.register_buffer("A_log", init_A_log(len(tasks), channels=expanded, state_size=config.state_size).detach())
        self.register_buffer("D", init_D(len(tasks), channels=expanded).detach())

    def forward(self, stage: Tensor, orders: Tensor) -> tuple[Tensor, ...]:
        """(B, C, h, w) stage, (K, L) scan orders → T maps (B, d, h, w): u + project(scan) ⊙ gate."""
        f = self.shared_norm(self.shared(stage))
        u = [self.conv[task](f) if self.conv is not None else f for task in self.norm]
        n = [norm(u_t) for norm, u_t in zip(self.norm.values(), u, strict=True)]
        z = [F.silu(gate(n_t)) for gate, n_t in zip(self.gate.values(), n, strict=True)]
        y = self.scan([expand(F.silu(n_t)) for expand, n_t in zip(self.expand.values(), n, strict=True)], orders)
        y = zip(self.contract.values(), y, strict=True)
        y = [contract(y_t).transpose(1, 2).unflatten(2, stage.shape[-2:]) for contract, y_t in y]
        return tuple(torch.addcmul(u_t, y_t, z_t) for u_t, y_t, z_t in zip(u, y, z, strict=True))

    def scan(self, x: Sequence[Tensor], orders: Tensor) -> Tensor:
        """T signals (B, e, h, w) → (T, B, L, e), the sum over the scan orders."""
        B, C = (to_tokens(experts(x)) for experts in (self.B, self.C))
        tokens = torch.stack([to_tokens(x_t) for x_t in x])
        del x  # its maps take room
        lows = [reduce(x_t) for reduce, x_t in zip(self.delta_reduce.values(), tokens, strict=True)]
        steps = self.delta_restore.values()  # their bias is added inside the scan, in float32
        delta = torch.stack([F.linear(low, step.weight) for low, step in zip(lows, steps, strict=True)])
        bias = torch.stack([step.bias for step in steps])
        A = -torch.exp(self.A_log.float())
        return selective_scan(tokens, delta, A, B, C, self.D, orders, delta_bias=bias)


class ReleasedDecoder(nn.Module):
    """Stage maps of the backbone → one feature map per task: a softmax over the stages at every position.

    Attributes:
        grad_checkpointing: a stage's activations are computed again in the backward pass instead of kept.

    Args:
        config: settings of the decoder.
        channels: channels of the stage maps.
        grid: rows and columns of tokens that the routers' weights of positions belong to.
        stages: number of stage maps S.
        tasks: names of the tasks.

    Raises:
        ConfigError: settings that do not fit together.
    """

    grad_checkpointing = False

    def __init__(self, config: ReleasedConfig, channels: int, grid: tuple[int, int], stages: int, tasks: list[str]):
        super().__init__()
        check(config)
        width = config.width
        self.tasks = tasks
        self.scan, self.orders = RELEASED_CURVES.get(config.scan, config.scan), config.orders
        self.stages = nn.ModuleList(ReleasedStage(config, channels, grid, tasks) for _ in range(stages))
        self.fuse = per_task(tasks, lambda: StageFusion(width, stages))

    def forward(self, stages: list[Tensor]) -> dict[str, Tensor]:
        """S maps (B, C, h, w) → task name → (B, d, h, w)."""
        height, width = stages[0].shape[-2:]
        orders = scan_orders(self.scan, height, width, self.orders).to(stages[0].device)
        run = checkpointed if self.grad_checkpointing else call
        features = [run(block, x, orders) for block, x in zip(self.stages, stages, strict=True)]
        return {task: fuse(maps) for (task, fuse), *maps in zip(self.fuse.items(), *features, strict=True)}

    def observe(self, maps: dict[str, Tensor]) -> list[RemovableHandle]:
        """Collect the intermediate results of every forward pass, until the returned handles are removed.

        Args:
            maps: is filled for stage s and task t: `tokens.<s>` (B, L, C), the input; `B.<s>.<t>` and `C.<s>.<t>` (B, N, h, w)
                as the scan uses them; `stage.<s>.<t>` (B, d, h, w), the output; `order/<k>` (L,), the positions in the order of
                scan k.

        Returns:
            Handles of the hooks.
        """

        def write(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
            return lambda module, inputs, output: maps.update(
                {f"{name}.{task}": value for task, value in zip(self.tasks, output, strict=True)}
            )

        def enter(index: int) -> Callable[[nn.Module, tuple], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
                maps[f"tokens.{index}"] = inputs[0].flatten(2).transpose(1, 2)
                maps.update({f"order/{k}": order for k, order in enumerate(inputs[1])})

            return hook

        handles = []
        for s, stage in enumerate(self.stages):
            handles.append(stage.register_forward_pre_hook(enter(s)))
            assert isinstance(stage, ReleasedStage)
            handles += [part.register_forward_hook(write(f"{n}.{s}")) for n, part in (("B", stage.B), ("C", stage.C))]
            handles.append(stage.register_forward_hook(write(f"stage.{s}")))
        return handles


def check(config: ReleasedConfig) -> None:
    """Raise ConfigError for settings that no network has."""
    if config.width % GROUPS:
        raise ConfigError(f"decoder.width: found {config.width}, expected a multiple of {GROUPS} (GroupNorm's groups)")
    if config.kernel_size % 2 == 0:
        raise ConfigError(f"decoder.kernel_size: found {config.kernel_size}, expected an odd number")
    check_choice("decoder.scan", config.scan, CURVES)
    most = MOST_ORDERS[RELEASED_CURVES.get(config.scan, config.scan)]
    if not 1 <= config.orders <= most:
        raise ConfigError(
            f"decoder.orders: found {config.orders}, expected 1 to {most}: the published code's {config.scan} has no more"
        )
    experts = config.experts
    if (experts.B or experts.C) and not 1 <= experts.top_k <= experts.count:
        raise ConfigError(
            f"decoder.experts.top_k: found {experts.top_k}, expected 1 to decoder.experts.count = {experts.count}"
        )


def to_tokens(maps: Tensor) -> Tensor:
    """(..., c, h, w) → (..., L, c)."""
    return maps.flatten(-2).transpose(-1, -2)
