"""MLoRE: Multi-Task Dense Prediction via Mixture of Low-Rank Experts (Yang et al., CVPR 2024): decoder.

The paper's Fig. 2 from left to right: a 1×1 convolution per stage → two MLoRE blocks per stage and task → fusion of the stages →
`ConvHead`. Where the paper's text and the published code differ, this is the code, whose weights are published.

Letters in shapes: B batch, T tasks, S stages, d width, h×w tokens, E experts, R the sum of their ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed.nn.functional as dist_functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pamm.config.peers import MLoREConfig
from pamm.config.strict import ConfigError
from pamm.models.backbone import Backbone
from pamm.models.pamm import ConvHead
from pamm.models.registry import Decoder, register_decoder, require_one_size
from pamm.nn.checkpointing import call, checkpointed
from pamm.nn.fusion import StageFusion
from pamm.nn.joined import JoinedBatchNorm2d
from pamm.nn.router import SpatialRouter
from pamm.nn.task_layers import per_task
from pamm.runtime.distributed import world_size
from pamm.tasks import Task


class LowRankExperts(nn.Module):
    """Experts of different ranks shared by the tasks, side by side: Conv3×3 to an expert's rank, Conv1×1 back to d channels.

    They are linear, so their weighted sum is one bottleneck of R channels.
    """

    def __init__(self, width: int, ranks: tuple[int, ...]):
        super().__init__()
        self.ranks = ranks
        self.reduce = nn.Conv2d(width, sum(ranks), 3, padding=1)
        assert self.reduce.bias is not None
        nn.init.zeros_(self.reduce.bias)
        columns = [torch.empty(width, rank).uniform_(-(rank**-0.5), rank**-0.5) for rank in ranks]
        self.restore = nn.Parameter(torch.cat(columns, dim=1))  # (d, R)
        self.restore_bias = nn.Parameter(torch.zeros(len(ranks), width))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """(B, d, h, w), weights of the experts (B, E) → (B, d, h, w): Σ_j p_j · E_j(x)."""
        per_rank = torch.cat([p.expand(-1, r) for p, r in zip(weights.split(1, dim=1), self.ranks, strict=True)], dim=1)
        hidden = self.reduce(x) * per_rank[:, :, None, None].to(x.dtype)
        bias = weights @ self.restore_bias.to(weights.dtype)
        return F.conv2d(hidden, self.restore[:, :, None, None]) + bias[:, :, None, None].to(x.dtype)


class MLoREBlock(nn.Module):
    """One MLoRE module for every task: routed experts of all tasks, the task's own low-rank path, a generic path (Fig. 3).

    u = Conv1×1(x);  v = BN(Σ_j p_j E_j(u)) + m · E_task(u) + G(u);  y = Conv1×1(GELU(BN(v))). No gradient goes back through
    G's input. The tasks share the experts E_j and the generic convolution G.
    """

    def __init__(self, config: MLoREConfig, grid: tuple[int, int], tasks: list[str]):
        super().__init__()
        width, rank, count = config.width, config.task_rank, len(config.ranks)
        self.enter = per_task(tasks, lambda: nn.Conv2d(width, width, 1))
        self.routers = per_task(
            tasks, lambda: SpatialRouter(width, grid, count, config.top_k, renormalised=config.pre_softmax)
        )
        self.experts = LowRankExperts(width, config.ranks)
        self.task_reduce = per_task(tasks, lambda: nn.Conv2d(width, rank, 3, padding=1))
        self.task_restore = per_task(tasks, lambda: nn.Conv2d(rank, width, 1))
        self.general = nn.Conv2d(width, width, 3, padding=1)
        self.norm_experts = per_task(tasks, lambda: JoinedBatchNorm2d(width))
        self.norm = per_task(tasks, lambda: JoinedBatchNorm2d(width))
        self.leave = per_task(tasks, lambda: nn.Conv2d(width, width, 1))

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """T maps (B, d, h, w) → T maps (B, d, h, w), and the experts' weights (T, B, E)."""
        outputs, routes = [], []
        for task, x in zip(self.routers, maps, strict=True):
            u = self.enter[task](x)
            weights, mix = self.routers[task](u)
            outputs.append(self.leave[task](F.gelu(self.mixture(task, u, weights, mix))))
            routes.append(weights)
        return outputs, torch.stack(routes)

    def mixture(self, task: str, u: Tensor, weights: Tensor, mix: Tensor) -> Tensor:
        """One task's (B, d, h, w) with its routing (B, E) and (B, 1) → BN(v), (B, d, h, w)."""
        own = self.task_restore[task](self.task_reduce[task](u))
        chosen = self.norm_experts[task](self.experts(u, weights))
        return self.norm[task](chosen + mix[:, :, None, None].to(u.dtype) * own + self.general(u.detach()))


class MLoREDecoder(nn.Module):
    """Stage maps of the backbone → one feature map per task.

    Attributes:
        grad_checkpointing: a block's activations are computed again in the backward pass instead of kept.

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

    def __init__(self, config: MLoREConfig, channels: int, grid: tuple[int, int], stages: int, tasks: list[str]):
        super().__init__()
        check(config)
        self.tasks, self.load_balancing = tasks, config.load_balancing
        self.reduce = nn.ModuleList(nn.Conv2d(channels, config.width, 1) for _ in range(stages))
        self.first = nn.ModuleList(MLoREBlock(config, grid, tasks) for _ in range(stages))
        self.second = nn.ModuleList(MLoREBlock(config, grid, tasks) for _ in range(stages))
        self.fuse = per_task(tasks, lambda: StageFusion(config.width, stages))

    def forward(self, stages: list[Tensor]) -> dict[str, Tensor]:
        """S maps (B, C, h, w) → task name → (B, d, h, w); in training also "loss/load_balancing", a number."""
        run = checkpointed if self.grad_checkpointing else call
        features, routes = [], []
        for stage, reduce, first, second in zip(stages, self.reduce, self.first, self.second, strict=True):
            maps, route_1 = run(first, [reduce(stage)] * len(self.tasks))
            maps, route_2 = run(second, maps)
            features.append(maps)
            routes += [route_1, route_2]
        of_task = zip(self.fuse.items(), *features, strict=True)
        outputs = {task: run(fuse, maps) for (task, fuse), *maps in of_task}
        if self.training:
            outputs["loss/load_balancing"] = self.load_balancing * sum(imbalance(route) for route in routes)
        return outputs

    def observe(self, maps: dict[str, Tensor]) -> list[RemovableHandle]:
        """Collect the intermediate results of every forward pass, until the returned handles are removed.

        Args:
            maps: is filled, for stage s, task t and block b (1 or 2), with `tokens.<s>` (B, L, C) and `map.<s>` (B, d, h, w), the
                input; `router<b>.<s>.<t>` (B, 2E + 1), logits, noise scales and mix; `route<b>.<s>.<t>` (B, E), the experts'
                weights; `block<b>.<s>.<t>` (B, d, h, w), the output; `mask.<t>` (B, S, h, w), the weights of the stages.

        Returns:
            Handles of the hooks.
        """

        def write(
            name: str, change: Callable[[Tensor], Tensor] = lambda x: x
        ) -> Callable[[nn.Module, tuple, Tensor], None]:
            return lambda module, inputs, output: maps.update({name: change(output)})

        def enter(stage: int) -> Callable[[nn.Module, tuple, Tensor], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
                maps[f"tokens.{stage}"], maps[f"map.{stage}"] = inputs[0].flatten(2).transpose(1, 2), output

            return hook

        def leave(number: int, stage: int) -> Callable[[nn.Module, tuple, tuple[list[Tensor], Tensor]], None]:
            def hook(module: nn.Module, inputs: tuple, output: tuple[list[Tensor], Tensor]) -> None:
                for task, y, route in zip(self.tasks, *output, strict=True):
                    maps[f"block{number}.{stage}.{task}"], maps[f"route{number}.{stage}.{task}"] = y, route

            return hook

        handles = [reduce.register_forward_hook(enter(s)) for s, reduce in enumerate(self.reduce)]
        for number, blocks in ((1, self.first), (2, self.second)):
            for s, block in enumerate(blocks):
                assert isinstance(block, MLoREBlock)
                handles.append(block.register_forward_hook(leave(number, s)))
                for task, router in block.routers.items():
                    handles.append(router.scores.register_forward_hook(write(f"router{number}.{s}.{task}")))
        masks = [(f"mask.{task}", fuse[-1]) for task, fuse in self.fuse.items()]
        return handles + [last.register_forward_hook(write(name, lambda x: x.softmax(1))) for name, last in masks]


def imbalance(route: Tensor) -> Tensor:
    """(std / mean)² over the experts of their mean weight over all tasks and images: weights (T, B, E) → a number.

    Of several processes it is of the joined batch's mean, the same number on each.
    """
    use = route.mean((0, 1))
    if world_size() > 1:
        use = dist_functional.all_reduce(use) / world_size()
    return (use.std() / use.mean()).square()


def check(config: MLoREConfig) -> None:
    """Raise ConfigError for settings that no network has."""
    if config.width < 4:
        raise ConfigError(f"decoder.width: found {config.width}, expected at least 4: the routers have a quarter of it")
    if len(config.ranks) < 2 or not 1 <= config.top_k <= len(config.ranks):
        raise ConfigError(
            f"decoder.ranks and decoder.top_k: found {len(config.ranks)} experts, of which {config.top_k} are kept; expected two "
            "experts or more, and 1 to all of them kept"
        )


@register_decoder(MLoREConfig)
def mlore(config: MLoREConfig, backbone: Backbone, tasks: Mapping[str, Task]) -> Decoder:
    """MLoRE's decoder and heads."""
    require_one_size(backbone)
    decoder = MLoREDecoder(config, backbone.channels, backbone.grid, len(backbone.out_indices), list(tasks))
    heads: dict[str, nn.Module] = {}
    for name, task in tasks.items():
        heads[name] = head = ConvHead(config.width, task.channels, bias=True)
        nn.init.trunc_normal_(head.conv.weight, std=0.02)
        assert head.predict.bias is not None
        nn.init.normal_(head.predict.bias, std=0.02)
    return decoder, heads
