"""TaskPrompter on a Swin Transformer (Cityscapes): the backbone with task prompts, and the head. Its decoder is that of the ViT.

Against the ViT's: prompts are attended in every window and averaged over them; the channel scores come from learned queries and
keys, and what they gather goes back into the prompts; between stages the scores and the prompts are merged as the tokens are.

Letters in shapes: B batch, T prompts, C channels of a stage, H heads, h×w its map, q channel width, n positions of a window.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from pamm.config.peers import TaskPrompterConfig
from pamm.config.strict import ConfigError
from pamm.models.backbone import Backbone
from pamm.nn.checkpointing import call, checkpointed
from pamm.nn.joined import JoinedBatchNorm2d
from pamm.nn.prompts import Level, init_prompts, prompt_linear
from pamm.nn.window_attention import relative_positions

MASKED = -100.0
"""Added to the scores of positions that a shifted window holds beside each other and the map does not."""


class PromptedSwinBlock(nn.Module):
    """A Swin block with prompts in every window. Its own parameters and names are those of timm's block.

    size: the stage's rows and columns for the image size it was built for: the channel path's weights are tied to them. A stage
    whose smaller side is no longer than the window has windows of that side, without shift. `last`: nothing reads its prompts.
    """

    def __init__(
        self, block: SwinTransformerBlock, size: tuple[int, int], channel_width: int, shifted: bool, last: bool
    ):
        super().__init__()
        dim, full = block.dim, block.window_size[0]
        self.window = min(full, *size)
        self.shift = full // 2 if shifted and min(size) > full else 0
        self.num_heads, self.size = block.attn.num_heads, size
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.drop_path1, self.drop_path2 = block.drop_path1, block.drop_path2
        self.attn: Any = nn.Module()
        self.attn.qkv, self.attn.proj = block.attn.qkv, block.attn.proj
        cut = slice(full - self.window, full + self.window - 1)  # the offsets of the smaller window
        offsets = block.attn.relative_position_bias_table.detach().unflatten(0, (2 * full - 1, -1))[cut, cut]
        self.attn.relative_position_bias_table = nn.Parameter(offsets.flatten(0, 1).clone())
        self.token_trans = prompt_linear(dim, channel_width)
        self.chan_q = prompt_linear(channel_width, channel_width)
        self.chan_kv = prompt_linear(size[0] * size[1], 2 * channel_width)
        self.chan_proj = None if last else prompt_linear(channel_width, channel_width)
        self.token_trans1 = None if last else prompt_linear(channel_width, dim)

    def forward(self, x: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, h, w, C), (B, T, C) → both, the scores with the positions (B, H, T, h, w) and with the channels (B, T, C)."""
        attended, gathered, spatial = self.attend(self.norm1(x), self.norm1(prompts))
        channel, back = self.by_channel(prompts, attended)
        x = x + self.drop_path1(attended)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        if back is None:  # nothing reads these prompts, which the published code leaves unfinished
            return x, gathered, spatial, channel
        prompts = prompts + self.drop_path1(gathered + back)
        return x, prompts + self.drop_path2(self.mlp(self.norm2(prompts))), spatial, channel

    def attend(self, x: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised (B, h, w, C) and (B, T, C) → attention's results for both, and the prompts' raw scores (B, H, T, h, w)."""
        (batch, height, width, _), count, side = x.shape, prompts.shape[1], self.window
        padded = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = padded.shape[1] // side, padded.shape[2] // side
        shifted = torch.roll(padded, (-self.shift, -self.shift), (1, 2))
        windows = shifted.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3).flatten(3, 4)
        of_prompts = prompts[:, None, None].expand(-1, rows, columns, -1, -1)
        tokens = torch.cat([of_prompts, windows], dim=3).flatten(0, 2)  # (B·windows, T + n, C)
        q, k, v = self.attn.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = F.pad(self.bias(*padded.shape[1:3]), (count, 0, count, 0))  # (1 or windows, H, T + n, T + n)
        bias = (bias.repeat(batch, 1, 1, 1) if self.shift else bias.expand(len(q), -1, -1, -1)).to(q.dtype)
        y = self.attn.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
        gathered = y[:, :count].unflatten(0, (batch, -1)).mean(1)
        attended = self.joined(y[:, count:].unflatten(0, (batch, rows, columns)), (height, width))
        scores = (q[:, :, :count] @ k[:, :, count:].mT).flatten(1, 2).mT  # (B·windows, n, H·T)
        spatial = self.joined(scores.unflatten(0, (batch, rows, columns)), (height, width))
        return attended, gathered, spatial.permute(0, 3, 1, 2).unflatten(1, (self.num_heads, count))

    def joined(self, windows: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, rows, columns, n, c) windows, shifted and padded → (B, *size, c)."""
        side = self.window
        maps = windows.unflatten(3, (side, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return torch.roll(maps, (self.shift, self.shift), (1, 2))[:, : size[0], : size[1]]

    def bias(self, height: int, width: int) -> Tensor:
        """What is added to the scaled scores in the windows of a padded map: (1, H, n, n), with a shift (windows, H, n, n)."""
        index = relative_positions(self.window, self.attn.relative_position_bias_table.device)
        bias = self.attn.relative_position_bias_table[index].permute(2, 0, 1)[None]
        if not self.shift:
            return bias
        sides = []
        for length in (height, width):  # 0, 1, 2: before the last window, in it, come around
            place = torch.arange(length, device=bias.device)
            sides.append((place >= length - self.window).long() + (place >= length - self.shift).long())
        regions = (3 * sides[0][:, None] + sides[1]).unflatten(1, (-1, self.window)).unflatten(0, (-1, self.window))
        regions = regions.transpose(1, 2).flatten(2).flatten(0, 1)  # (windows, n)
        return bias + MASKED * (regions[:, :, None] != regions[:, None])[:, None]

    def by_channel(self, prompts: Tensor, attended: Tensor) -> tuple[Tensor, Tensor | None]:
        """Prompts (B, T, C) before their norm and the attention's result (B, h, w, C) → raw scores (B, T, C), and what is
        gathered from the channels for the prompts."""
        maps = attended.permute(0, 3, 1, 2)
        if maps.shape[-2:] != self.size:
            maps = F.interpolate(maps.float(), size=self.size, mode="bilinear", align_corners=False, antialias=True)
            maps = maps.to(attended.dtype)
        q, (k, v) = self.chan_q(self.token_trans(prompts)), self.chan_kv(maps.flatten(2)).chunk(2, dim=2)
        scores = q @ k.mT
        if self.chan_proj is None or self.token_trans1 is None:
            return scores, None
        weights = (scores * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
        return scores, self.token_trans1(self.chan_proj(weights @ v))


class Merging(nn.Module):
    """What lies between two stages: tokens by timm's patch merging, scores and prompts as they are."""

    def __init__(self, merging: Any, heads: int, tasks: int, channels: int):
        super().__init__()
        self.norm, self.reduction = merging.norm, merging.reduction
        self.spa_attn_ds = nn.Conv2d(heads * tasks, heads * tasks, 3, stride=2, padding=1)
        self.process_chan_attn = prompt_linear(channels, 2 * channels, bias=False)
        self.task_prompts_up = prompt_linear(channels, 2 * channels, bias=False)

    def forward(self, x: Tensor, prompts: Tensor, spatial: Tensor, channel: Tensor) -> tuple[Tensor, ...]:
        """(B, h, w, C), (B, T, C), (B, H, T, h, w), (B, T, C) → the same at half the size and twice the channels."""
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        spatial = self.spa_attn_ds(spatial.flatten(1, 2)).unflatten(1, spatial.shape[1:3])
        x = self.reduction(self.norm(torch.cat(quarters, dim=3)))
        return x, self.task_prompts_up(prompts), spatial, self.process_chan_attn(channel)


class PromptedSwin(Backbone):
    """A Swin Transformer whose windows hold prompts of the tasks as well; a stage is a `Level`.

    The first stages are the outputs of the patch merging, the last one passes the final norm. The image is first
    resized by `image_ratio`, to whole tokens of the last stage: it takes any size.
    """

    def __init__(self, swin: SwinTransformer, image_size: tuple[int, int], config: TaskPrompterConfig, tasks: int):
        super().__init__()
        count = len(swin.layers)
        self.image_ratio, self.out_indices = config.image_ratio, tuple(range(count))
        self.output_stride = 1  # any size is brought to whole tokens
        side: int = cast(Any, swin.patch_embed).patch_size[0]
        self.last_stride = side << (count - 1)
        self.patch_embed, self.norm = swin.patch_embed, swin.norm
        self.prompts = init_prompts(tasks, swin.embed_dim)
        rows, columns = (length // side for length in self.inner_size(*image_size))
        stages, merging, heads = [], [], []
        layers = cast("list[Any]", list(swin.layers))
        for number, layer in enumerate(layers):
            dim = swin.embed_dim << number
            heads.append(layer.blocks[0].attn.num_heads)
            blocks = [
                PromptedSwinBlock(
                    block,
                    (rows, columns),
                    config.channel_width,
                    i % 2 == 1,
                    number == count - 1 and i == len(layer.blocks) - 1,
                )
                for i, block in enumerate(layer.blocks)
            ]
            stages.append(nn.ModuleList(blocks))
            if number < count - 1:
                merging.append(Merging(layers[number + 1].downsample, heads[-1], tasks, dim))
            rows, columns = rows // 2, columns // 2
        self.stages, self.merging = nn.ModuleList(stages), nn.ModuleList(merging)
        self.heads, widest = tuple(heads), count - 1
        self.channels = tuple(swin.embed_dim << min(number + 1, widest) for number in range(count))
        self.grad_checkpointing = False

    def inner_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, pixels, of the image that the patches are cut from."""
        rows, columns = (max(1, round(side * self.image_ratio / self.last_stride)) for side in (height, width))
        return rows * self.last_stride, columns * self.last_stride

    def forward(self, image: Tensor) -> list[Level]:
        """(B, 3, H, W) normalised image → one Level per stage."""
        size = self.inner_size(*image.shape[-2:])
        if tuple(image.shape[-2:]) != size:
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        x = self.patch_embed(image)  # (B, h, w, C)
        prompts, levels = self.prompts.to(x.dtype).expand(len(x), -1, -1), []
        run = checkpointed if self.grad_checkpointing else call
        for number, blocks in enumerate(self._stages()):
            for block in blocks:
                x, prompts, spatial, channel = run(block, x, prompts)
            if number < len(self.merging):
                x, prompts, spatial, channel = run(self.merging[number], x, prompts, spatial, channel)
            else:
                x = self.norm(x)
            empty = spatial.new_zeros(len(x), 0)  # there is no cross-task reweighting
            levels.append(Level(x.permute(0, 3, 1, 2), spatial, channel[..., None, None], empty, prompts))
        return levels

    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages, first to last."""
        return [block for stage in self._stages() for block in stage]

    def _stages(self) -> list[nn.ModuleList]:
        return cast("list[nn.ModuleList]", list(self.stages))

    def before(self, count: int) -> tuple[list[nn.Module], list[nn.Parameter]]:
        """The modules and parameters through which an image goes before block `count` + 1; a stage ends with its merging."""
        chosen = self.blocks()[:count]
        merged = [merging for merging, stage in zip(self.merging, self._stages(), strict=False) if stage[-1] in chosen]
        return [self.patch_embed, *merged, *chosen], [self.prompts]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a block's activations are computed again in the backward pass instead of kept."""
        self.grad_checkpointing = enable


class PromptedSwinHead(nn.Sequential):
    """ConvTranspose 2×2, BatchNorm, GELU, Conv3×3, BatchNorm, GELU, Conv1×1: (B, f, h, w) → (B, outputs, 2h, 2w)."""

    def __init__(self, width: int, outputs: int):
        half = width // 2
        super().__init__(
            nn.ConvTranspose2d(width, half, 2, stride=2),
            JoinedBatchNorm2d(half),
            nn.GELU(),
            nn.Conv2d(half, half, 3, padding=1),
            JoinedBatchNorm2d(half),
            nn.GELU(),
            nn.Conv2d(half, outputs, 1),
        )


def check(config: TaskPrompterConfig) -> None:
    """Raise ConfigError for settings that no network on a Swin has."""
    if config.chan_nheads != 1 or config.use_ctr:
        raise ConfigError(
            "decoder.chan_nheads and decoder.use_ctr: TaskPrompter on a Swin has one window of channel scores and no cross-task "
            "reweighting: set them to 1 and False"
        )
    if config.width < 2:
        raise ConfigError(f"decoder.width: found {config.width}, expected at least 2: the head halves it")
