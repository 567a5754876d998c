"""Backbones: timm transformers that hand out the outputs of chosen blocks or stages."""

from __future__ import annotations

from typing import Any

import timm
import torch.nn.functional as F
from timm.models import is_model_in_modules
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pamm.config.experiment import BackboneConfig
from pamm.config.strict import ConfigError
from pamm.files import first_line
from pamm.models.hub import hub_cache
from pamm.nn.joined import join_drop_paths
from pamm.nn.replace import replace_modules, taking_over

SWIN_STRIDE = 2
"""Tokens of a Swin stage per token of the next, along one side."""

ARGUMENTS = {
    VisionTransformer: {
        "patch": "patch_size",
        "width": "embed_dim",
        "depth": "depth",
        "heads": "num_heads",
        "mlp_ratio": "mlp_ratio",
    },
    SwinTransformer: {
        "patch": "patch_size",
        "width": "embed_dim",
        "stage_depths": "depths",
        "stage_heads": "num_heads",
        "window": "window_size",
        "mlp_ratio": "mlp_ratio",
    },
}
"""timm class → field of BackboneConfig → timm's name of that argument."""

SIZES = sorted({field for names in ARGUMENTS.values() for field in names})


class ViT(nn.Module):
    """A timm VisionTransformer; stages are the outputs of the blocks named by `taps`.

    The last block's output passes the final norm, earlier ones are raw (paper §V-C, blocks 3, 6, 9, 12 of ViT-B).
    `channels` is the width of every stage, `patch` the side of a token in pixels, `grid` the rows and columns of tokens of
    the image size it was built for.
    """

    def __init__(self, vit: VisionTransformer, taps: tuple[int, ...]):
        super().__init__()
        depth = len(vit.blocks)
        _check_taps(taps, depth, "block")
        self.taps = taps
        self.channels: int = vit.embed_dim
        self.patch: int = vit.patch_embed.patch_size[0]
        self.grid: tuple[int, int] = tuple(vit.patch_embed.grid_size)
        if taps[-1] < depth:  # blocks and a norm that no stage reads would be parameters without a gradient
            vit.blocks = vit.blocks[: taps[-1]]
            vit.norm = nn.Identity()
        self.vit = vit

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised image → one (B, C, H/patch, W/patch) map per tap. Raises ValueError for other sizes."""
        height, width = image.shape[-2:]
        _check_image(height, width, self.patch)
        indices = [tap - 1 for tap in self.taps]
        stages = self.vit.forward_intermediates(image, indices=indices, output_fmt="NLC", intermediates_only=True)
        stages[-1] = self.vit.norm(stages[-1])
        grid = height // self.patch, width // self.patch
        return [stage.transpose(1, 2).unflatten(2, grid) for stage in stages]

    def blocks(self) -> list[nn.Module]:
        """The blocks, first to last."""
        return list(self.vit.blocks)

    def before(self, count: int) -> tuple[list[nn.Module], list[nn.Parameter]]:
        """The modules and parameters through which an image goes before block `count` + 1."""
        vit = self.vit
        loose = [vit.pos_embed, vit.cls_token, getattr(vit, "reg_token", None)]
        return [vit.patch_embed, vit.norm_pre, *self.blocks()[:count]], [p for p in loose if p is not None]

    def set_recompute(self, on: bool) -> None:
        """Whether a block's activations are made again in the backward pass instead of kept."""
        self.vit.set_grad_checkpointing(on)


class Swin(nn.Module):
    """A timm SwinTransformer; the stages named by `taps` are handed out, each through a LayerNorm of its own (`norms`).

    Windows keep their size for any image: maps are padded to whole windows with zeros at the right and bottom, and padded
    tokens are not masked. `channels` are the stages' widths, `patch` the side of the last stage's token in pixels.
    """

    def __init__(self, swin: SwinTransformer, taps: tuple[int, ...]):
        super().__init__()
        _check_taps(taps, len(swin.layers), "stage")
        self.taps = taps
        self.channels: tuple[int, ...] = tuple(swin.feature_info[tap - 1]["num_chs"] for tap in taps)
        self.patch: int = swin.patch_embed.patch_size[0] * SWIN_STRIDE ** (taps[-1] - 1)
        swin.layers = swin.layers[: taps[-1]]
        swin.norm = nn.Identity()
        replace_modules(swin, lambda block: taking_over(PaddedSwinBlock, block, SwinTransformerBlock))
        self.swin = swin
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised image → maps (B, C, H/4, W/4), (B, 2C, H/8, W/8), … Raises ValueError for other sizes."""
        _check_image(*image.shape[-2:], self.patch)
        x, stages = self.swin.patch_embed(image), []
        for number, layer in enumerate(self.swin.layers, start=1):
            x = layer(x)  # (B, h, w, C)
            if number in self.taps:
                stages.append(self.norms[len(stages)](x).permute(0, 3, 1, 2))
        return stages

    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages, first to last."""
        return [block for layer in self.swin.layers for block in layer.blocks]

    def before(self, count: int) -> tuple[list[nn.Module], list[nn.Parameter]]:
        """The modules and parameters through which an image goes before block `count` + 1; a stage merges patches first."""
        chosen = self.blocks()[:count]
        merging = [layer.downsample for layer in self.swin.layers if layer.blocks[0] in chosen]
        return [self.swin.patch_embed, *merging, *chosen], []

    def set_recompute(self, on: bool) -> None:
        """Whether a block's activations are made again in the backward pass instead of kept."""
        self.swin.set_grad_checkpointing(on)


class PaddedSwinBlock(SwinTransformerBlock):
    """timm's block, which shifts a map and then pads it to whole windows, in the order of MMSegmentation: pad, then shift.

    The two differ wherever a map is not a whole number of windows.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        padded = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        return super()._attn(padded)[:, :height, :width]


class NoBackbone(nn.Module):
    """What stands for a backbone that is not there: a network read without one decodes stage maps made elsewhere."""

    def __init__(self, width: int, taps: tuple[int, ...]):
        super().__init__()
        self.taps = taps
        self.channels: tuple[int, ...] = tuple(width * 2 ** (tap - 1) for tap in taps)
        self.patch = 4 * SWIN_STRIDE ** (taps[-1] - 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        raise ValueError(
            "this network has no backbone: give its stage maps to model.decode(stages, size), or load a checkpoint that holds "
            "the backbone's weights"
        )

    def blocks(self) -> list[nn.Module]:
        """None."""
        return []

    def set_recompute(self, on: bool) -> None:
        """Nothing is kept here."""


def create_backbone(config: BackboneConfig, image_size: tuple[int, int]) -> ViT | Swin | NoBackbone:
    """Build the configured backbone for `image_size` (H, W); other sizes work too (a ViT resamples its position embeddings).

    Raises ConfigError for an unknown name, a model of another family, and weights that cannot be fetched.
    """
    if config.name == "none":
        if config.width is None or not config.taps:
            raise ConfigError(
                'backbone.width and backbone.taps: expected those of the stage maps where the name is "none"'
            )
        return NoBackbone(config.width, config.taps)
    if not timm.is_model(config.name):
        near = ", ".join(timm.list_models(f"*{config.name.split('_')[0]}*")[:5]) or "vit_base_patch16_384"
        raise ConfigError(f"backbone.name: timm knows no model '{config.name}'; for example: {near}")
    swin = is_model_in_modules(config.name.split(".")[0], {"swin_transformer"})
    kind = SwinTransformer if swin else VisionTransformer
    arguments: dict[str, Any] = {"img_size": image_size, "num_classes": 0, "drop_path_rate": config.drop_path}
    arguments |= _sizes(config, kind)
    if swin:
        arguments |= {"strict_img_size": False, "always_partition": True}
    else:
        arguments |= {"dynamic_img_size": True, "global_pool": ""}
    model = _create(config, arguments, kind)
    if not (swin or config.class_token):
        _remove_class_token(model)
    join_drop_paths(model)
    backbone = Swin(model, config.taps) if swin else ViT(model, config.taps)
    if any(side % backbone.patch for side in image_size):
        raise ConfigError(
            f"data.size: found {image_size[0]}×{image_size[1]}, expected multiples of the patch, {backbone.patch}; "
            f"for example {_padded(*image_size, backbone.patch)}"
        )
    return backbone


def _sizes(config: BackboneConfig, kind: type) -> dict[str, Any]:
    """The configured sizes under timm's names. Raises ConfigError for one that this family does not have."""
    given = {field: getattr(config, field) for field in SIZES if getattr(config, field) is not None}
    for field in given:
        if field not in ARGUMENTS[kind]:
            raise ConfigError(
                f"backbone.{field}: '{config.name}' is built as a {kind.__name__}, which has {', '.join(ARGUMENTS[kind])}"
            )
    return {ARGUMENTS[kind][field]: value for field, value in given.items()}


def _create(config: BackboneConfig, arguments: dict[str, Any], kind: type) -> Any:
    """The timm model, of class `kind`, or ConfigError with what is wrong and the remedy."""
    random = "start from random weights with --model.backbone.pretrained False"
    cache = hub_cache() if config.pretrained else None
    if cache:
        arguments = {**arguments, "cache_dir": cache}
    try:
        model = timm.create_model(config.name, pretrained=config.pretrained, **arguments)
    except OSError as error:
        raise ConfigError(
            f"the pretrained weights of '{config.name}' could not be fetched ({first_line(error)}). Connect to the network "
            f"once so that timm can fetch them, or {random}"
        ) from error
    except RuntimeError as error:
        if not config.pretrained:
            raise
        raise ConfigError(
            f"the pretrained weights of '{config.name}' cannot be used ({first_line(error)}). Leave the backbone's sizes "
            f"unset, or {random}"
        ) from error
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(
            f"timm cannot build '{config.name}' as a plain vision transformer or a Swin transformer with {arguments}: "
            f"{first_line(error)}"
        ) from error
    if not isinstance(model, kind):
        raise ConfigError(
            f"backbone '{config.name}' is a {type(model).__name__}, expected a plain timm VisionTransformer or SwinTransformer"
        )
    return model


def _check_taps(taps: tuple[int, ...], count: int, what: str) -> None:
    if not taps or list(taps) != sorted(set(taps)) or taps[0] < 1 or taps[-1] > count:
        raise ConfigError(f"backbone.taps: found {list(taps)}, expected increasing {what} numbers from 1 to {count}")


def _check_image(height: int, width: int, patch: int) -> None:
    if height % patch or width % patch:
        raise ValueError(
            f"image of {height}×{width} pixels: both sides must be multiples of the patch, {patch}; "
            f"pad it to {_padded(height, width, patch)}, or use pamm.Predictor, which takes any size"
        )


def _remove_class_token(vit: VisionTransformer) -> None:
    """Leave the class token and its position embedding out of the sequence; the image's tokens keep theirs."""
    vit.pos_embed = nn.Parameter(vit.pos_embed.detach()[:, vit.num_prefix_tokens :].clone())
    vit.cls_token, vit.num_prefix_tokens, vit.has_class_token = None, 0, False


def _padded(height: int, width: int, patch: int) -> str:
    return "×".join(str(-(-side // patch) * patch) for side in (height, width))
