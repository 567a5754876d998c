"""Backbones: timm vision transformers that hand out the outputs of chosen blocks as stages."""

from __future__ import annotations

from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pamm.experiment import BackboneConfig, ConfigError
from pamm.nn.joined import join_drop_paths


class ViT(nn.Module):
    """A timm VisionTransformer; stages are the outputs of the blocks named by `taps`.

    The last block's output passes the final norm, earlier ones are raw (paper §V-C, blocks 3, 6, 9, 12 of ViT-B).
    `channels` is the width of every stage, `patch` the side of a token in pixels, `grid` the rows and columns of tokens of
    the image size it was built for.
    """

    def __init__(self, vit: VisionTransformer, taps: tuple[int, ...]):
        super().__init__()
        depth = len(vit.blocks)
        if not taps or list(taps) != sorted(set(taps)) or taps[0] < 1 or taps[-1] > depth:
            raise ConfigError(f"backbone.taps: found {list(taps)}, expected increasing block numbers from 1 to {depth}")
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
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"image of {height}×{width} pixels: both sides must be multiples of the patch, {self.patch}; "
                f"pad it to {_padded(height, width, self.patch)}, or use pamm.Predictor, which takes any size"
            )
        indices = [tap - 1 for tap in self.taps]
        stages = self.vit.forward_intermediates(image, indices=indices, output_fmt="NLC", intermediates_only=True)
        stages[-1] = self.vit.norm(stages[-1])
        grid = height // self.patch, width // self.patch
        return [stage.transpose(1, 2).unflatten(2, grid) for stage in stages]


def create_backbone(config: BackboneConfig, image_size: tuple[int, int]) -> ViT:
    """Build the configured ViT with position embeddings for `image_size` (H, W); other sizes resample them on the fly.

    Raises ConfigError for an unknown name, a model that is not a plain ViT, and weights that cannot be fetched.
    """
    names = {"patch_size": config.patch, "embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    arguments: dict[str, Any] = {key: value for key, value in names.items() if value is not None}
    arguments |= {"img_size": image_size, "dynamic_img_size": True, "drop_path_rate": config.drop_path}
    arguments |= {"num_classes": 0, "global_pool": ""}
    vit = _create_vit(config, arguments)
    patch = vit.patch_embed.patch_size[0]
    if image_size[0] % patch or image_size[1] % patch:
        raise ConfigError(
            f"data.size: found {image_size[0]}×{image_size[1]}, expected multiples of the patch, {patch}; "
            f"for example {_padded(*image_size, patch)}"
        )
    if not config.class_token:
        _remove_class_token(vit)
    join_drop_paths(vit)
    return ViT(vit, config.taps)


def _create_vit(config: BackboneConfig, arguments: dict[str, Any]) -> VisionTransformer:
    """timm's model, or ConfigError with what is wrong and the remedy."""
    if not timm.is_model(config.name):
        near = ", ".join(timm.list_models(f"*{config.name.split('_')[0]}*")[:5]) or "vit_base_patch16_384"
        raise ConfigError(f"backbone.name: timm knows no model '{config.name}'; for example: {near}")
    random = "start from random weights with --model.backbone.pretrained False"
    try:
        vit = timm.create_model(config.name, pretrained=config.pretrained, **arguments)
    except OSError as error:
        raise ConfigError(
            f"the pretrained weights of '{config.name}' could not be fetched ({_first_line(error)}). Connect to the network "
            f"once so that timm can fetch them, or {random}"
        ) from error
    except RuntimeError as error:
        if not config.pretrained:
            raise
        raise ConfigError(
            f"the pretrained weights of '{config.name}' cannot be used ({_first_line(error)}). Leave backbone.patch, width, "
            f"depth and heads unset, or {random}"
        ) from error
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(
            f"timm cannot build '{config.name}' as a plain vision transformer with {arguments}: {_first_line(error)}"
        ) from error
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(
            f"backbone '{config.name}' is a {type(vit).__name__}, expected a plain timm VisionTransformer"
        )
    return vit


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _remove_class_token(vit: VisionTransformer) -> None:
    """Leave the class token and its position embedding out of the sequence; the image's tokens keep theirs."""
    vit.pos_embed = nn.Parameter(vit.pos_embed.detach()[:, vit.num_prefix_tokens :].clone())
    vit.cls_token, vit.num_prefix_tokens, vit.has_class_token = None, 0, False


def _padded(height: int, width: int, patch: int) -> str:
    return "×".join(str(-(-side // patch) * patch) for side in (height, width))
