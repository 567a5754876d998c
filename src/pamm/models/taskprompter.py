"""TaskPrompter: Spatial-Channel Multi-Task Prompting (Ye and Xu, ICLR 2023): a ViT with task prompts, and the decoder.

The paper's Fig. 2 from left to right: prompts of the tasks go through the transformer beside the image's tokens → the raw scores of
their attention weigh the features of four levels → the sum of the levels → `ConvHead`. The backbone returns a `Level` in the
place of a map. Where the paper and the published code differ, this is the code, whose weights are published.

Letters in shapes: B batch, T tasks, C channels of a level, H heads, h×w its map, L = h·w, e level width, f width of the features,
m×m windows of the channel scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pamm.config.experiment import ModelConfig
from pamm.config.peers import TaskPrompterConfig
from pamm.models.backbone import Backbone, ViT, check_image, create_transformer
from pamm.models.pamm import ConvHead
from pamm.models.registry import Decoder, register_decoder
from pamm.models.taskprompter_swin import PromptedSwin, PromptedSwinHead
from pamm.models.taskprompter_swin import check as check_swin
from pamm.nn.checkpointing import call, checkpointed
from pamm.nn.joined import JoinedBatchNorm2d
from pamm.nn.prompts import Level, init_prompts, prompt_linear
from pamm.nn.task_layers import per_task
from pamm.tasks import Task


class PromptedViT(ViT):
    """A vision transformer whose blocks take prompts of the tasks beside the tokens of the image; a stage is a `Level`.

    A block's prompts are also mapped to all positions and back (`spread`, `gather`): these weights are tied to the grid of the
    image size it was built for. On another grid the maps of positions are resized, in proportion to the area.
    """

    unread_weight: Tensor | None
    unread_bias: Tensor | None

    def __init__(self, vit: VisionTransformer, out_indices: tuple[int, ...], config: TaskPrompterConfig, tasks: int):
        super().__init__(vit, out_indices)
        depth, positions = len(vit.blocks), self.grid[0] * self.grid[1]
        self.windows = math.isqrt(config.chan_nheads)
        self.output_stride = self.output_stride * self.windows  # every window holds whole tokens
        self.prompts = init_prompts(tasks, self.channels)
        self.spread = nn.ModuleList(prompt_linear(self.channels, positions) for _ in range(depth))
        self.gather = nn.ModuleList(prompt_linear(positions, self.channels) for _ in range(depth - 1))
        self.grad_checkpointing = False
        for name in ("unread_weight", "unread_bias"):  # the last block's map back, for those who look at its prompts
            self.register_buffer(name, None, persistent=False)

    def forward(self, image: Tensor) -> list[Level]:
        """(B, 3, H, W) normalised image → one Level per stage, the last through the final norm. Raises ValueError."""
        check_image(*image.shape[-2:], stride=self.output_stride)
        tokens = self.vit.patch_embed(image)  # (B, h, w, C)
        grid = (tokens.shape[1], tokens.shape[2])
        assert self.vit.pos_embed is not None
        x = tokens.flatten(1, 2) + resample_abs_pos_embed(self.vit.pos_embed, list(grid), list(self.grid), 0)
        prompts, levels = self.prompts.to(x.dtype).expand(len(x), -1, -1), []
        run = checkpointed if self.grad_checkpointing else call
        for number in range(len(self.vit.blocks)):
            x, prompts, scores = run(self.block, number, x, prompts, grid)
            if scores is not None:
                levels.append((x, *scores, prompts))
        x, *rest = levels[-1]
        levels[-1] = (self.vit.norm(x), *rest)
        return [Level(x.transpose(1, 2).unflatten(2, grid), *rest) for x, *rest in levels]

    def block(
        self, number: int, x: Tensor, prompts: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
        """Block `number`, from 0: tokens (B, L, C), prompts (B, T, C) → both, and the scores where it ends a level."""
        block: Any = self.vit.blocks[number]
        count, scores = prompts.shape[1], None
        normal = block.norm1(torch.cat([prompts, x], dim=1))
        spread = self.spread[number](normal[:, :count])  # (B, T, positions)
        if number in self.out_indices:
            attended, raw = prompted_attention(block.attn, normal, count)
            scores = (
                raw[..., count:].unflatten(3, grid),
                self.by_channel(spread, normal[:, count:], grid),
                raw[..., :count],
            )
        else:
            attended = block.attn(normal)
        x = x + block.drop_path1(attended[:, count:])
        gathered = self.gathered(number, spread)
        if gathered is None:
            return x + block.drop_path2(block.mlp(block.norm2(x))), None, scores
        prompts = prompts + block.drop_path1(attended[:, :count] + gathered)
        hidden = block.mlp(block.norm2(torch.cat([prompts, x], dim=1)))
        return x + block.drop_path2(hidden[:, count:]), prompts + block.drop_path2(hidden[:, :count]), scores

    def gathered(self, number: int, spread: Tensor) -> Tensor | None:
        """A block's map back from the positions, (B, T, C). The last has none, unless `unread_weight` is set."""
        if number < len(self.gather):
            return self.gather[number](spread)
        return None if self.unread_weight is None else F.linear(spread, self.unread_weight, self.unread_bias)

    def by_channel(self, spread: Tensor, normal: Tensor, grid: tuple[int, int]) -> Tensor:
        """A prompt's map of positions (B, T, ·) times the normalised tokens (B, L, C), in every window: (B, T, C, m, m)."""
        maps = spread.unflatten(2, self.grid)
        if grid != self.grid:
            share = self.grid[0] * self.grid[1] / (grid[0] * grid[1])
            maps = share * F.interpolate(maps.float(), size=grid, mode="bilinear", align_corners=False, antialias=True)
        m, (height, width) = self.windows, grid
        maps = maps.to(normal.dtype).unflatten(3, (m, width // m)).unflatten(2, (m, height // m))
        tokens = normal.unflatten(1, (m, height // m, m, width // m))
        return torch.einsum("btiyjx,biyjxc->btcij", maps, tokens)

    def before(self, count: int) -> tuple[list[nn.Module], list[nn.Parameter]]:
        """The modules and parameters through which an image goes before block `count` + 1."""
        modules, parameters = super().before(count)
        return [*modules, *self.spread[:count], *self.gather[:count]], [*parameters, self.prompts]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a block's activations are computed again in the backward pass instead of kept."""
        self.grad_checkpointing = enable


def prompted_attention(attention: Any, normal: Tensor, prompts: int) -> tuple[Tensor, Tensor]:
    """timm's attention on (B, T + L, C), and its raw scores of the first T queries: (B, T + L, C), (B, H, T, T + L)."""
    q, k, v = attention.qkv(normal).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v)
    return attention.proj(y.transpose(1, 2).flatten(2)), q[:, :, :prompts] @ k.mT


class TaskFusion(nn.Module):
    """One level's feature of one task: its map weighed by the spatial and by the channel scores, both joined."""

    def __init__(self, channels: int, config: TaskPrompterConfig, *, upsample: bool):
        super().__init__()
        width, last = config.width, 3 if upsample else 1
        self.scale = 2 if upsample else 1
        self.spatial = nn.Conv2d(channels, config.level_width, 1)
        self.channel = nn.Conv2d(channels, config.level_width, 1)
        self.fuse = nn.Sequential(
            nn.Conv2d(2 * config.level_width, width, 1),
            nn.Conv2d(width, width, 3, padding=1),
            JoinedBatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, width, last, padding=last // 2),
        )

    def forward(self, x: Tensor, spatial: Tensor, channel: Tensor) -> Tensor:
        """(B, C, h, w), its task's scores (B, H, h, w) and (B, C, m, m) → (B, f, h, w), or (B, f, 2h, 2w)."""
        by_head = 1 + spatial.repeat_interleave(x.shape[1] // spatial.shape[1], dim=1)
        by_window = 1 + F.interpolate(channel, size=x.shape[-2:], mode="nearest")
        both = torch.cat([self.spatial(x * by_head), self.channel(x * by_window)], dim=1)
        if self.scale > 1:
            both = F.interpolate(both, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return self.fuse(both)


class LevelDecoder(nn.Module):
    """One level: a feature per task, and their sums weighed by the prompts' scores with each other (cross-task reweighting)."""

    def __init__(
        self, channels: int, heads: int, config: TaskPrompterConfig, tasks: list[str], *, upsample: bool = False
    ):
        super().__init__()
        self.tasks = per_task(tasks, lambda: TaskFusion(channels, config, upsample=upsample))
        self.cross = None
        if config.use_ctr:
            self.cross = per_task(
                tasks, lambda: nn.Sequential(nn.Conv2d(heads, heads, 1), nn.GELU(), nn.Conv2d(heads, 1, 1))
            )

    def forward(self, level: Level) -> list[Tensor]:
        """→ T maps (B, f, ·, ·)."""
        found = [
            fusion(level.x, level.spatial[:, :, t], level.channel[:, t]) for t, fusion in enumerate(self.tasks.values())
        ]
        if self.cross is None:
            return found
        maps = torch.stack(found, dim=1)  # (B, T, f, h, w)
        scores = [cross(level.cross[:, :, t : t + 1])[:, 0, 0] for t, cross in enumerate(self.cross.values())]
        return list(torch.einsum("bvt,btfhw->bvfhw", torch.stack(scores, dim=1).to(maps.dtype), maps).unbind(1))


class TaskPrompterDecoder(nn.Module):
    """Levels of the prompted backbone → one feature map per task: the sum of the levels at the size of the first.

    Attributes:
        grad_checkpointing: a level's activations are computed again in the backward pass instead of kept.

    Args:
        config: settings of the decoder.
        channels: channels of each level.
        heads: attention heads of each level.
        tasks: names of the tasks.
        upsample: double the resolution of each level's features, and pass their sum through a Conv3×3 per task.
    """

    grad_checkpointing = False

    def __init__(
        self,
        config: TaskPrompterConfig,
        channels: Sequence[int],
        heads: Sequence[int],
        tasks: list[str],
        *,
        upsample: bool = False,
    ):
        super().__init__()
        self.levels = nn.ModuleList(
            LevelDecoder(*sizes, config, tasks, upsample=upsample) for sizes in zip(channels, heads, strict=True)
        )
        self.project = (
            per_task(tasks, lambda: nn.Conv2d(config.width, config.width, 3, padding=1)) if upsample else None
        )
        self.tasks = tasks

    def forward(self, levels: list[Level]) -> dict[str, Tensor]:
        """→ task name → (B, f, h, w)."""
        run = checkpointed if self.grad_checkpointing else call
        maps = [run(decoder, level) for decoder, level in zip(self.levels, levels, strict=True)]
        size = maps[0][0].shape[-2:]
        sums: dict[str, Any] = {
            t: sum(resized(x, size) for x in own) for t, *own in zip(self.tasks, *maps, strict=True)
        }
        return sums if self.project is None else {task: self.project[task](x) for task, x in sums.items()}

    def observe(self, maps: dict[str, Tensor]) -> list[RemovableHandle]:
        """Collect the intermediate results of every forward pass, until the returned handles are removed.

        Args:
            maps: is filled for level l with `tokens.<l>` (B, L, C), `prompts.<l>` (B, T, C), `spatial.<l>` (B, H, T, L) (of a
                Swin (B, H, T, h, w)), `channel.<l>` (B, T, C, m, m) and `cross.<l>` (B, H, T, T); for task t with
                `fuse.<l>.<t>` before and `level.<l>.<t>` after the cross-task reweighting, (B, f, ·, ·).

        Returns:
            Handles of the hooks.
        """

        def enter(number: int, module: nn.Module, inputs: tuple[Level]) -> None:
            level = inputs[0]
            found = {"tokens": level.x.flatten(2).transpose(1, 2), "channel": level.channel, "prompts": level.prompts}
            if self.project is None:
                found |= {"spatial": level.spatial.flatten(3), "cross": level.cross}
            else:
                found |= {"spatial": level.spatial}
            maps.update({f"{name}.{number}": x for name, x in found.items() if x is not None})

        def leave(number: int, module: nn.Module, inputs: tuple[Level], output: list[Tensor]) -> None:
            maps.update({f"level.{number}.{task}": x for task, x in zip(self.tasks, output, strict=True)})

        def write(name: str, _: nn.Module, __: object, output: Tensor) -> None:
            maps[name] = output

        handles = []
        for number, decoder in enumerate(self.levels):
            assert isinstance(decoder, LevelDecoder)
            handles.append(decoder.register_forward_pre_hook(partial(enter, number)))
            handles.append(decoder.register_forward_hook(partial(leave, number)))
            if self.project is None:
                for task, fusion in decoder.tasks.items():
                    handles.append(fusion.register_forward_hook(partial(write, f"fuse.{number}.{task}")))
        return handles


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, c, ·, ·) → (B, c, *size), bilinear."""
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def prompted(config: ModelConfig, tasks: Mapping[str, Task], image_size: tuple[int, int]) -> Backbone:
    """The backbone that holds prompts of the tasks. Raises ConfigError."""
    assert isinstance(config.decoder, TaskPrompterConfig)
    transformer, count = create_transformer(config.backbone, image_size), len(tasks) + config.decoder.further_prompts
    if isinstance(transformer, VisionTransformer):
        return PromptedViT(transformer, config.backbone.out_indices, config.decoder, count)
    check_swin(config.decoder)
    return PromptedSwin(transformer, image_size, config.decoder, count)


@register_decoder(TaskPrompterConfig, backbone=prompted)
def taskprompter(
    config: TaskPrompterConfig, backbone: PromptedViT | PromptedSwin, tasks: Mapping[str, Task]
) -> Decoder:
    """TaskPrompter's decoder and heads."""
    heads: dict[str, nn.Module] = {}
    if isinstance(backbone, PromptedSwin):
        heads = {name: PromptedSwinHead(config.width, task.channels) for name, task in tasks.items()}
        sizes = backbone.channels, backbone.heads
        return TaskPrompterDecoder(config, *sizes, list(tasks), upsample=True), heads
    for name, task in tasks.items():
        heads[name] = head = ConvHead(config.width, task.channels, bias=True)
        nn.init.trunc_normal_(head.conv.weight, std=0.02)
    levels = len(backbone.out_indices)
    block: Any = backbone.vit.blocks[0]
    sizes = [backbone.channels] * levels, [block.attn.num_heads] * levels
    return TaskPrompterDecoder(config, *sizes, list(tasks)), heads
