"""Backbones: timm transformers that hand out the outputs of chosen blocks or stages."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, cast

import timm
import torch.nn.functional as F
from timm.models import is_model_in_modules
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage
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

SIZES = {
    VisionTransformer: ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"),
    SwinTransformer: ("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio"),
}
"""timm class → its arguments that are fields of BackboneConfig."""


class Backbone(nn.Module):
    """An image encoder; the base class of every family.

    A subclass has a `forward`, (B, 3, H, W) normalised image → the stages' maps (B, C, h, w), first to last, and sets the
    attributes.

    Attributes:
        out_indices: numbers of its stages.
        channels: channels of the maps: one number if all stages have one size, otherwise one per stage.
        output_stride: the sides of an image are multiples of it, pixels.
        grid: rows and columns of the maps for the image size it was built for; only if all stages have one size.
    """

    out_indices: tuple[int, ...]
    channels: Any
    output_stride: int
    grid: tuple[int, int]

    def blocks(self) -> list[nn.Module]:
        """The blocks that may be frozen.

        Returns:
            The blocks, first to last.
        """
        return []

    def before(self, count: int) -> tuple[list[nn.Module], list[nn.Parameter]]:
        """The first blocks and everything before them; `train.freeze` freezes these parts.

        Args:
            count: number of blocks, 0 to all.

        Returns:
            Modules; and parameters that belong to none of them.
        """
        return self.blocks()[:count], []

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute a block's activations again in the backward pass instead of keeping them. By default they are kept.

        Args:
            enable: on or off.
        """


Family = Callable[[BackboneConfig, tuple[int, int]], Backbone]
"""Settings and image size (H, W), pixels → the backbone."""

FAMILIES: dict[str, Family] = {}
"""Pattern of names, as in a shell → the family of backbones that they mean; other names are timm's."""


def register_backbone(pattern: str) -> Callable[[Family], Family]:
    """Decorator for a function that builds a family of backbones from settings and image size.

    Args:
        pattern: names of the family, as in a shell, e.g. "resnet*".

    Returns:
        The decorator.
    """

    def register(family: Family) -> Family:
        FAMILIES[pattern] = family
        return family

    return register


class ViT(Backbone):
    """A timm VisionTransformer whose stages are the outputs of some blocks.

    The last block's output passes the final norm, earlier ones do not (paper §V-C: ViT-B's blocks 3, 6, 9, 12 counted from 1).

    Attributes:
        channels: width of every stage.
        output_stride: side of a token, pixels.
        grid: rows and columns of tokens of the image size that it was built for.

    Args:
        vit: timm's model.
        out_indices: blocks whose outputs are the stages, from 0, rising.
    """

    def __init__(self, vit: VisionTransformer, out_indices: tuple[int, ...]):
        super().__init__()
        depth = len(vit.blocks)
        _check_indices(out_indices, depth, "block")
        self.out_indices = out_indices
        self.channels: int = vit.embed_dim
        self.output_stride: int = vit.patch_embed.patch_size[0]
        self.grid: tuple[int, int] = tuple(vit.patch_embed.grid_size)
        if out_indices[-1] < depth - 1:  # blocks and a norm that no stage reads would be parameters without a gradient
            vit.blocks = vit.blocks[: out_indices[-1] + 1]
            vit.norm = nn.Identity()
        self.vit = vit

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised image → one (B, C, H/stride, W/stride) map per stage. Raises ValueError for other sizes."""
        height, width = image.shape[-2:]
        check_image(height, width, self.output_stride)
        indices = list(self.out_indices)
        stages = self.vit.forward_intermediates(image, indices=indices, output_fmt="NLC", intermediates_only=True)
        assert isinstance(stages, list)
        stages[-1] = self.vit.norm(stages[-1])
        grid = height // self.output_stride, width // self.output_stride
        return [stage.transpose(1, 2).unflatten(2, grid) for stage in stages]

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""
        return list(self.vit.blocks)

    def before(self, count: int) -> tuple[list[nn.Module], list[nn.Parameter]]:
        """See `Backbone.before`."""
        vit = self.vit
        loose = [vit.pos_embed, vit.cls_token, getattr(vit, "reg_token", None)]
        return [vit.patch_embed, vit.norm_pre, *self.blocks()[:count]], [p for p in loose if p is not None]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `Backbone.set_grad_checkpointing`."""
        self.vit.set_grad_checkpointing(enable)


class Swin(Backbone):
    """A timm SwinTransformer whose stages pass a LayerNorm each (`norms`).

    Windows keep their size for any image: maps are padded to whole windows with zeros at the right and bottom. Padded tokens
    are not masked.

    Attributes:
        channels: width of every stage.
        output_stride: side of the last stage's token, pixels.

    Args:
        swin: timm's model.
        out_indices: stages to return, from 0, rising.
    """

    def __init__(self, swin: SwinTransformer, out_indices: tuple[int, ...]):
        super().__init__()
        _check_indices(out_indices, len(swin.layers), "stage")
        self.out_indices = out_indices
        self.channels: tuple[int, ...] = tuple(swin.feature_info[index]["num_chs"] for index in out_indices)
        side: Any = swin.patch_embed.patch_size
        self.output_stride: int = side[0] * SWIN_STRIDE ** out_indices[-1]
        swin.layers = swin.layers[: out_indices[-1] + 1]
        swin.norm = nn.Identity()
        replace_modules(swin, lambda block: taking_over(PaddedSwinBlock, block, SwinTransformerBlock))
        self.swin = swin
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised image → maps (B, C, H/4, W/4), (B, 2C, H/8, W/8), … Raises ValueError for other sizes."""
        check_image(*image.shape[-2:], stride=self.output_stride)
        x, stages = self.swin.patch_embed(image), []
        for index, layer in enumerate(self.swin.layers):
            x = layer(x)  # (B, h, w, C)
            if index in self.out_indices:
                stages.append(self.norms[len(stages)](x).permute(0, 3, 1, 2))
        return stages

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of all stages, first to last."""
        return [block for layer in self._layers() for block in layer.blocks]

    def before(self, count: int) -> tuple[list[nn.Module], list[nn.Parameter]]:
        """See `Backbone.before`; a stage merges patches before its first block."""
        chosen = self.blocks()[:count]
        merging = [layer.downsample for layer in self._layers() if layer.blocks[0] in chosen]
        return [self.swin.patch_embed, *merging, *chosen], []

    def _layers(self) -> list[SwinTransformerStage]:
        return cast("list[SwinTransformerStage]", list(self.swin.layers))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `Backbone.set_grad_checkpointing`."""
        self.swin.set_grad_checkpointing(enable)


class PaddedSwinBlock(SwinTransformerBlock):
    """timm's block, which shifts a map and then pads it to whole windows, in the order of MMSegmentation: pad, then shift.

    The two differ wherever a map is not a whole number of windows.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        padded = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        return super()._attn(padded)[:, :height, :width]


class NoBackbone(Backbone):
    """Stands for a missing backbone: the network decodes stage maps that were computed elsewhere."""

    def __init__(self, embed_dim: int, out_indices: tuple[int, ...]):
        super().__init__()
        self.out_indices = out_indices
        self.channels: tuple[int, ...] = tuple(embed_dim * 2**index for index in out_indices)
        self.output_stride = 4 * SWIN_STRIDE ** out_indices[-1]

    def forward(self, image: Tensor) -> list[Tensor]:
        raise ValueError(
            "this network has no backbone: give its stage maps to model.decode(stages, size), or load a checkpoint that holds "
            "the backbone's weights"
        )


@register_backbone("none")
def no_backbone(config: BackboneConfig, image_size: tuple[int, int]) -> NoBackbone:
    """A backbone that is not there, of the configured channels. Raises ConfigError."""
    if config.embed_dim is None or not config.out_indices:
        raise ConfigError(
            'backbone.embed_dim and backbone.out_indices: expected those of the stage maps where the name is "none"'
        )
    return NoBackbone(config.embed_dim, config.out_indices)


def create_backbone(config: BackboneConfig, image_size: tuple[int, int]) -> Backbone:
    """Build the configured backbone.

    Args:
        config: its settings.
        image_size: (H, W) of the images, pixels. Other sizes work too: a ViT resamples its position embeddings.

    Returns:
        The backbone.

    Raises:
        ConfigError: an unknown name, a model of another family, or weights that cannot be downloaded.
    """
    family = next(
        (family for pattern, family in FAMILIES.items() if fnmatchcase(config.name, pattern)), timm_transformer
    )
    backbone = family(config, image_size)
    if not isinstance(backbone, NoBackbone):
        check_size(image_size, backbone.output_stride)
    return backbone


def timm_transformer(config: BackboneConfig, image_size: tuple[int, int]) -> ViT | Swin:
    """The plain vision transformer or Swin transformer that timm knows by this name. Raises ConfigError."""
    model = create_transformer(config, image_size)
    return Swin(model, config.out_indices) if isinstance(model, SwinTransformer) else ViT(model, config.out_indices)


def create_transformer(config: BackboneConfig, image_size: tuple[int, int]) -> Any:
    """timm's own VisionTransformer or SwinTransformer of this name, with joined stochastic depth. Raises ConfigError."""
    if not timm.is_model(config.name):
        near = ", ".join(timm.list_models(f"*{config.name.split('_')[0]}*")[:5]) or "vit_base_patch16_384"
        others = ", ".join(pattern for pattern in FAMILIES if pattern != "none")
        others = f"; other families: {others}" if others else ""
        raise ConfigError(f"backbone.name: timm knows no model '{config.name}'; for example: {near}{others}")
    swin = is_model_in_modules(config.name.split(".")[0], {"swin_transformer"})
    kind = SwinTransformer if swin else VisionTransformer
    arguments: dict[str, Any] = {"img_size": image_size, "num_classes": 0, "drop_path_rate": config.drop_path_rate}
    arguments |= _sizes(config, kind)
    if swin:
        arguments |= {"strict_img_size": False, "always_partition": True}
    else:
        arguments |= {"dynamic_img_size": True, "global_pool": ""}
    model = _create(config, arguments, kind)
    if not (swin or config.class_token):
        _remove_class_token(model)
    join_drop_paths(model)
    return model


def _sizes(config: BackboneConfig, kind: type) -> dict[str, Any]:
    """The configured sizes, as timm's arguments. Raises ConfigError for one that this family does not have."""
    fields = sorted({field for names in SIZES.values() for field in names})
    given = {field: getattr(config, field) for field in fields if getattr(config, field) is not None}
    for field in given:
        if field not in SIZES[kind]:
            raise ConfigError(
                f"backbone.{field}: '{config.name}' is built as a {kind.__name__}, which has {', '.join(SIZES[kind])}"
            )
    if "num_heads" in given and isinstance(given["num_heads"], tuple) != (kind is SwinTransformer):
        expected = "a number for every stage" if kind is SwinTransformer else "one number"
        raise ConfigError(f"backbone.num_heads: found {given['num_heads']}, expected {expected} for a {kind.__name__}")
    return given


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


def _check_indices(out_indices: tuple[int, ...], count: int, what: str) -> None:
    if (
        not out_indices
        or list(out_indices) != sorted(set(out_indices))
        or out_indices[0] < 0
        or out_indices[-1] >= count
    ):
        raise ConfigError(
            f"backbone.out_indices: found {list(out_indices)}, expected increasing {what} numbers from 0 to {count - 1}"
        )


def check_size(image_size: tuple[int, int], stride: int) -> None:
    """Raise ConfigError for the size (H, W) of a network's images, pixels, whose sides are no multiples of `stride`."""
    if any(side % stride for side in image_size):
        raise ConfigError(
            f"data.size: found {image_size[0]}×{image_size[1]}, expected multiples of {stride}; for example "
            f"{_padded(*image_size, stride)}"
        )


def check_image(height: int, width: int, stride: int) -> None:
    """Raise ValueError for an image whose sides are no multiples of `stride`."""
    if height % stride or width % stride:
        raise ValueError(
            f"image of {height}×{width} pixels: both sides must be multiples of {stride}; "
            f"pad it to {_padded(height, width, stride)}, or use pamm.Predictor, which takes any size"
        )


def _remove_class_token(vit: VisionTransformer) -> None:
    """Leave the class token and its position embedding out of the sequence; the image's tokens keep theirs."""
    assert vit.pos_embed is not None
    vit.pos_embed = nn.Parameter(vit.pos_embed.detach()[:, vit.num_prefix_tokens :].clone())
    vit.cls_token, vit.num_prefix_tokens, vit.has_class_token = None, 0, False


def _padded(height: int, width: int, stride: int) -> str:
    return "×".join(str(-(-side // stride) * stride) for side in (height, width))
