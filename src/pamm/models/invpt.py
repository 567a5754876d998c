"""InvPT: Inverted Pyramid Multi-task Transformer for Dense Scene Understanding (Ye and Xu, ECCV 2022): decoder.

The paper's Fig. 2 from left to right: a preliminary decoder per task with an intermediate prediction → three stages of rising
resolution, each one attention over the tokens of all tasks, which hands its scores on to the next → the sum of the stages →
a 1×1 convolution as head. Where the paper and the published code differ, this is the code, whose weights are published.

Letters in shapes: B batch, T tasks, C channels of the backbone, E preliminary width, D_s width of stage s, h×w the map of the first
stage, half the backbone's grid. A list of maps holds one (B, D_s, h·2^s, w·2^s) per task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pamm.config.peers import InvPTConfig
from pamm.config.strict import ConfigError
from pamm.models.backbone import Backbone
from pamm.models.registry import Decoder, register_decoder, require_one_size
from pamm.nn.checkpointing import call, checkpointed
from pamm.nn.joined import JoinedBatchNorm2d
from pamm.nn.task_layers import per_task
from pamm.tasks import Task

STAGES = 3


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, c, ·, ·) → (B, c, *size), bilinear."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def conv_block(inputs: int, outputs: int, *, dilation: int = 1) -> list[nn.Module]:
    """Conv3×3 without bias, BatchNorm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
    return [conv, JoinedBatchNorm2d(outputs), nn.ReLU()]


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer as the stages' are initialised: trunc-normal 0.02, bias 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def to_tokens(maps: list[Tensor]) -> Tensor:
    """T maps (B, D, h, w) → (B, T·h·w, D), one task after the other."""
    return torch.stack(maps, dim=1).flatten(3).transpose(2, 3).flatten(1, 2)


def to_maps(tokens: Tensor, tasks: int, size: tuple[int, int]) -> list[Tensor]:
    """Inverse of `to_tokens`."""
    return list(tokens.unflatten(1, (tasks, -1)).transpose(2, 3).unflatten(3, size).unbind(1))


class PreliminaryDecoder(nn.Module):
    """One task's feature, its intermediate prediction, and both mixed."""

    def __init__(self, channels: int, config: InvPTConfig, outputs: int):
        super().__init__()
        width = config.preliminary_width
        self.decode = nn.Sequential(*conv_block(channels, channels), *conv_block(channels, width))
        self.predict = nn.Conv2d(width, outputs, 1)
        self.mix = nn.Conv2d(width + outputs, config.width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) → (B, D_0, h, w), logits (B, outputs, h, w)."""
        feature = self.decode(x)
        prediction = self.predict(feature)
        return self.mix(torch.cat([feature, prediction], dim=1)), prediction


class CrossTaskAttention(nn.Module):
    """Attention over all tasks at half resolution; its scores are fused with those of the stage before.

    Scores are scaled by the whole width, not a head's, and handed on as they are before the softmax.
    """

    def __init__(self, config: InvPTConfig, stage: int, tasks: list[str]):
        super().__init__()
        width = config.width >> stage
        self.num_heads, self.stride = config.num_heads, 2 << stage
        conv = {"stride": 2, "padding": 1, "groups": width, "bias": False}
        self.reduce = per_task(
            tasks, lambda: nn.Sequential(nn.Conv2d(width, width, 3, **conv), JoinedBatchNorm2d(width))
        )
        self.query, self.key, self.value, self.project = (linear(width, width) for _ in range(4))
        self.fuse = nn.Conv2d(2 * config.num_heads, config.num_heads, 1) if stage else None

    def forward(self, maps: list[Tensor], message: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Maps of the stage, scores of the one before (B, heads, T·queries/4, keys) → maps, scores (B, heads, T·queries, keys)."""
        height, width = maps[0].shape[-2:]
        small = height // 2, width // 2
        queries = [reduce(x) for reduce, x in zip(self.reduce.values(), maps, strict=True)]
        pooled = to_tokens([F.avg_pool2d(x, self.stride) for x in maps])
        q, k, v = self.query(to_tokens(queries)), self.key(pooled), self.value(pooled)
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = (q * (len(self.query.bias) ** -0.5)) @ k.mT
        if message is not None and self.fuse is not None:
            scores = self.fuse(torch.cat([scores, self.upsample(message, small)], dim=1))
        y = self.project((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return [resized(x, (height, width)) for x in to_maps(y, len(maps), small)], scores

    def upsample(self, message: Tensor, size: tuple[int, int]) -> Tensor:
        """Scores (B, heads, T·(h/2)·(w/2), keys) → (B, heads, T·h·w, keys), bilinear on every task's map of queries."""
        half = (len(self.reduce), size[0] // 2, size[1] // 2)
        maps = message.unflatten(2, half).permute(0, 1, 2, 5, 3, 4)  # (B, heads, T, keys, h/2, w/2)
        large = resized(maps.flatten(1, 3), size).unflatten(1, maps.shape[1:4])
        return large.permute(0, 1, 2, 4, 5, 3).flatten(2, 4)


class Stage(nn.Module):
    """One stage (Fig. 3). All but the first: twice the resolution at half the width, and the backbone's skip."""

    def __init__(self, config: InvPTConfig, stage: int, tasks: list[str]):
        super().__init__()
        width = config.width >> stage
        self.embed = per_task(tasks, lambda: self.up_embedding(2 * width, width)) if stage else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = CrossTaskAttention(config, stage, tasks)
        self.mlp = nn.Sequential(linear(width, 4 * width), nn.GELU(), linear(4 * width, width))

    @staticmethod
    def up_embedding(inputs: int, width: int) -> nn.Sequential:
        """Bilinear ×2, then two dilated convolutions."""
        large = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        return nn.Sequential(large, *conv_block(inputs, width, dilation=2), *conv_block(width, width, dilation=2))

    def forward(self, maps: list[Tensor], skip: Tensor | None, message: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Maps of the stage before, the skip (B, D_s, ·, ·), scores of the stage before → maps, scores."""
        if self.embed is not None:
            maps = [embed(x) + skip for embed, x in zip(self.embed.values(), maps, strict=True)]
        tasks, size = len(maps), (maps[0].shape[-2], maps[0].shape[-1])
        x = to_tokens(maps)
        attended, scores = self.attend(to_maps(self.norm1(x), tasks, size), message)
        x = x + to_tokens(attended)
        return to_maps(x + self.mlp(self.norm2(x)), tasks, size), scores


class InvPTDecoder(nn.Module):
    """Stage maps of the backbone (the first, the second and the last are used) → one feature map per task at 1/4 of the image.

    Attributes:
        grad_checkpointing: a stage's activations are computed again in the backward pass instead of kept.

    Args:
        config: settings of the decoder.
        channels: channels of the stage maps.
        outputs: task name → channels of its prediction, in order.

    Raises:
        ConfigError: settings that do not fit together.
    """

    grad_checkpointing = False
    stride = 4
    """Sides of the backbone's maps are multiples of it."""

    def __init__(self, config: InvPTConfig, channels: int, outputs: Mapping[str, int]):
        super().__init__()
        check(config)
        tasks, widths = list(outputs), [config.width >> stage for stage in range(STAGES)]
        self.tasks = tasks
        self.preliminary = nn.ModuleDict({t: PreliminaryDecoder(channels, config, n) for t, n in outputs.items()})
        self.skip_1 = nn.Conv2d(channels, widths[1], 3, padding=1)
        self.skip_2 = nn.ConvTranspose2d(channels, widths[2], 3, stride=2, padding=1, output_padding=1)
        self.stages = nn.ModuleList(Stage(config, stage, tasks) for stage in range(STAGES))
        self.norms = nn.ModuleList(nn.LayerNorm(len(tasks) * width) for width in widths)
        self.widen = nn.ModuleList(
            per_task(tasks, lambda width=width: nn.Conv2d(width, config.width, 1)) for width in widths[1:]
        )
        self.project = per_task(tasks, lambda: self.projection(config.width))

    @staticmethod
    def projection(width: int) -> nn.Sequential:
        """The layers after every task's sum.

        Args:
            width: channels.

        Returns:
            The layers.
        """
        conv = nn.Conv2d(width, width, 3, padding=1)
        nn.init.trunc_normal_(conv.weight, std=0.02)
        return nn.Sequential(conv, JoinedBatchNorm2d(width), nn.ReLU())

    def forward(self, stages: list[Tensor]) -> dict[str, Tensor]:
        """Maps (B, C, 2h, 2w) → task → (B, D_0, 8h, 8w); in training also "intermediate/<task>", logits (B, channels, h, w).

        Raises ValueError for maps whose sides are no multiples of 4.
        """
        height, width = stages[0].shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"stage maps of {height}×{width} positions: InvPT needs multiples of {self.stride}; pad the image, or use "
                "pamm.Predictor, which takes any size"
            )
        run = checkpointed if self.grad_checkpointing else call
        x = resized(stages[-1], (height // 2, width // 2))
        made = [run(preliminary, x) for preliminary in self.preliminary.values()]
        maps, predictions = (list(values) for values in zip(*made, strict=True))
        skips = None, self.skip_1(stages[1]), self.skip_2(stages[0])
        message, sums = None, [0.0] * len(maps)
        for number, (stage, skip) in enumerate(zip(self.stages, skips, strict=True)):
            maps, message = run(stage, maps, skip, message)
            sums = [a + b for a, b in zip(sums, self.at_quarter(number, maps, (4 * height, 4 * width)), strict=True)]
        found = {task: run(project, x) for (task, project), x in zip(self.project.items(), sums, strict=True)}
        if self.training:
            found |= {f"intermediate/{task}": x for task, x in zip(self.tasks, predictions, strict=True)}
        return found

    def at_quarter(self, number: int, maps: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Normalise a stage's maps over the channels of all tasks together, and bring them to D_0 channels and `size`.

        Args:
            number: number of the stage, from 0.
            maps: a map (B, D_s, h, w) per task.
            size: height and width of the result.

        Returns:
            A map (B, D_0, *size) per task.
        """
        joined = self.norms[number](torch.cat(maps, dim=1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        normal = joined.chunk(len(maps), dim=1)
        if number:
            layers = self.widen[number - 1]
            assert isinstance(layers, nn.ModuleDict)
            normal = [widen(x) for widen, x in zip(layers.values(), normal, strict=True)]
        return [resized(x, size) for x in normal]

    def observe(self, maps: dict[str, Tensor]) -> list[RemovableHandle]:
        """Collect the intermediate results of every forward pass, until the returned handles are removed.

        Args:
            maps: is filled with `tokens.<k>` (B, L, C), the backbone's maps; for task t with `preliminary.<t>` (B, E, h, w),
                `inter.<t>`, its intermediate prediction, `mix.<t>` (B, D_0, h, w), both mixed, and `feature.<t>` (B, D_0, 8h, 8w);
                for stage s with `scores.<s>` (B, heads, T·queries, keys) and `stage.<s>.<t>` (B, D_s, ·, ·).

        Returns:
            Handles of the hooks.
        """

        def write(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
            return lambda module, inputs, output: maps.update({name: output})

        def enter(module: nn.Module, inputs: tuple[list[Tensor]]) -> None:
            maps.update({f"tokens.{k}": x.flatten(2).transpose(1, 2) for k, x in enumerate(inputs[0])})

        def leave(number: int) -> Callable[[nn.Module, tuple, tuple[list[Tensor], Tensor]], None]:
            def hook(module: nn.Module, inputs: tuple, output: tuple[list[Tensor], Tensor]) -> None:
                features, maps[f"scores.{number}"] = output
                maps.update({f"stage.{number}.{t}": x for t, x in zip(self.tasks, features, strict=True)})

            return hook

        handles = [self.register_forward_pre_hook(enter)]
        for task, part in self.preliminary.items():
            named = {"preliminary": part.decode, "inter": part.predict, "mix": part.mix, "feature": self.project[task]}
            handles += [m.register_forward_hook(write(f"{name}.{task}")) for name, m in named.items()]
        return handles + [stage.register_forward_hook(leave(number)) for number, stage in enumerate(self.stages)]


def check(config: InvPTConfig) -> None:
    """Raise ConfigError for settings that no network has."""
    last = config.width >> (STAGES - 1)
    if config.width % (1 << (STAGES - 1)) or last % config.num_heads:
        raise ConfigError(
            f"decoder.width: found {config.width}, expected a multiple of {config.num_heads << (STAGES - 1)}: the third stage "
            f"has a quarter of it, in {config.num_heads} heads (decoder.num_heads)"
        )


@register_decoder(InvPTConfig)
def invpt(config: InvPTConfig, backbone: Backbone, tasks: Mapping[str, Task]) -> Decoder:
    """InvPT's decoder and heads."""
    require_one_size(backbone)
    if len(backbone.out_indices) < 3:
        raise ConfigError(
            f"backbone.out_indices: found {len(backbone.out_indices)} stages, expected three or more: InvPT reads the first, the "
            "second and the last"
        )
    decoder = InvPTDecoder(config, backbone.channels, {name: task.channels for name, task in tasks.items()})
    return decoder, {name: nn.Conv2d(config.width, task.channels, 1) for name, task in tasks.items()}
