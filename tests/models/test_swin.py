"""The Swin backbone against timm's own and against an independent form of windowed attention that pads before it shifts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F

from pamm.config.recipes import get_recipe
from pamm.config.strict import ConfigError
from pamm.models.backbone import Swin, create_backbone
from tiny import SWIN


def build(size=(64, 96), **changes) -> Swin:
    torch.manual_seed(0)
    swin = create_backbone(replace(SWIN, **changes), size).eval()
    with torch.no_grad():
        for norm in swin.norms:
            norm.weight.add_(0.1 * torch.randn_like(norm.weight))
            norm.bias.add_(0.1 * torch.randn_like(norm.bias))
    return swin


def test_stages_are_the_outputs_of_the_timm_model_each_through_its_norm():
    ours = build((64, 64), window_size=2, depths=(2, 2, 2, 2))  # all maps are whole windows: nothing is padded
    plain = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=(64, 64),
        window_size=2,
        embed_dim=16,
        depths=(2, 2, 2, 2),
        num_heads=(1, 1, 2, 2),
        num_classes=0,
        always_partition=True,
    ).eval()
    left = plain.load_state_dict(ours.swin.state_dict(), strict=False)
    assert left.unexpected_keys == [] and set(left.missing_keys) == {"norm.weight", "norm.bias"}
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        raw = plain.forward_intermediates(image, intermediates_only=True)
        stages = ours(image)
    for number, (stage, raw_map, norm) in enumerate(zip(stages, raw, ours.norms, strict=True)):
        assert stage.shape == (2, 16 << number, 16 >> number, 16 >> number)
        expected = F.layer_norm(raw_map.movedim(1, -1), norm.normalized_shape, norm.weight, norm.bias, 1e-5).movedim(
            -1, 1
        )
        torch.testing.assert_close(stage, expected)


def plain_attention(block, x: torch.Tensor) -> torch.Tensor:
    """One block's attention of one image x (h, w, C), window by window: padded, then shifted; regions that the shift joined
    do not see each other, padding is seen."""
    height, width, channels = x.shape
    side, shift = block.window_size[0], block.shift_size[0]
    rows, columns = -(-height // side) * side, -(-width // side) * side
    padded = torch.zeros(rows, columns, channels)
    padded[:height, :width] = x
    out = torch.zeros_like(padded)
    attend = block.attn
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            places = [((top + i) % rows, (left + j) % columns) for i in range(side) for j in range(side)]
            moved = [((i + shift) % rows, (j + shift) % columns) for i, j in places]
            regions = [(i + shift >= rows, j + shift >= columns) for i, j in places] if shift else [0] * len(places)
            tokens = torch.stack([padded[place] for place in moved])
            q, k, v = (
                (tokens @ attend.qkv.weight.T + attend.qkv.bias).view(len(places), 3, attend.num_heads, -1).unbind(1)
            )
            for head in range(attend.num_heads):
                scores = q[:, head] @ k[:, head].T * q.shape[-1] ** -0.5
                for a, (ai, aj) in enumerate(places):
                    for b, (bi, bj) in enumerate(places):
                        offset = (ai - bi + side - 1) * (2 * side - 1) + aj - bj + side - 1
                        scores[a, b] += attend.relative_position_bias_table[offset, head]
                        scores[a, b] -= 100.0 * (regions[a] != regions[b])
                mixed = scores.softmax(-1) @ v[:, head]
                step = mixed.shape[1]
                for place, value in zip(moved, mixed, strict=True):
                    out[place[0], place[1], head * step : (head + 1) * step] = value
    return (out @ attend.proj.weight.T + attend.proj.bias)[:height, :width]


@pytest.mark.parametrize("size", [(9, 14), (8, 12), (3, 5)])
@pytest.mark.parametrize("block", [0, 1], ids=["plain", "shifted"])
def test_maps_are_padded_before_they_are_shifted_and_padding_is_not_masked(size, block):
    swin = build(depths=(2, 1, 1, 1), num_heads=(2, 1, 2, 2))
    attention = swin.swin.layers[0].blocks[block]
    assert attention.shift_size == ((0, 0), (2, 2))[block]
    x = torch.randn(2, *size, 16)
    with torch.no_grad():
        ours = attention._attn(x)
        expected = torch.stack([plain_attention(attention, image) for image in x])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 96), (32, 32), (96, 160)])
def test_any_size_that_is_a_multiple_of_the_last_stride(size):
    swin = build()
    with torch.no_grad():
        stages = swin(torch.randn(1, 3, *size))
    assert [tuple(s.shape) for s in stages] == [(1, 16 << i, size[0] >> (2 + i), size[1] >> (2 + i)) for i in range(4)]


def test_other_sizes_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"70×96.*multiples of 32.*96×96.*Predictor"):
        build()(torch.randn(1, 3, 70, 96))
    with pytest.raises(ConfigError, match=r"found 70×96.*multiples of 32.*96×96"):
        build((70, 96))


def test_stages_after_the_last_tap_are_not_built():
    swin = build(out_indices=(0, 2))
    assert len(swin.swin.layers) == 3 and swin.output_stride == 16 and swin.channels == (16, 64)
    with torch.no_grad():
        assert [tuple(s.shape[1:]) for s in swin(torch.randn(1, 3, 64, 96))] == [(16, 16, 24), (64, 4, 6)]


def test_every_parameter_gets_a_gradient():
    swin = build(drop_path_rate=0.0).train()
    sum((stage * torch.randn_like(stage)).sum() for stage in swin(torch.randn(2, 3, 64, 96))).backward()
    assert [name for name, p in swin.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {
                "name": "swinv2_tiny_window8_256",
                "embed_dim": None,
                "depths": None,
                "num_heads": None,
                "window_size": None,
            },
            "is a SwinTransformerV2, expected a plain timm VisionTransformer or SwinTransformer",
        ),
        ({"out_indices": (2, 5, 8, 11)}, "increasing stage numbers from 0 to 3"),
        ({"depth": 3}, r"backbone\.depth: .* SwinTransformer, which has patch_size, embed_dim, depths"),
    ],
)
def test_a_backbone_that_cannot_be_is_told(change, message):
    with pytest.raises(ConfigError, match=message):
        build(**change)


@pytest.mark.parametrize(
    ("variant", "channels", "heads", "window", "parameters"),
    [
        ("", 192, (6, 12, 24, 48), 12, 195_201_204),
        ("+swin-b", 128, (4, 8, 16, 32), 12, None),
        ("+swin-s", 96, (3, 6, 12, 24), 7, None),
        ("+swin-t", 96, (3, 6, 12, 24), 7, None),
    ],
)
def test_swin_of_every_published_size(variant, channels, heads, window, parameters):
    config = get_recipe(f"nyud-mtmamba{variant}").model.backbone
    with torch.device("meta"):
        swin = create_backbone(replace(config, pretrained=False), (448, 576))
    assert swin.channels == tuple(channels << i for i in range(4))
    assert tuple(layer.blocks[0].attn.num_heads for layer in swin.swin.layers) == heads
    assert {b.window_size for layer in swin.swin.layers for b in layer.blocks} == {(window, window)}
    assert [n.eps for n in swin.norms] == [1e-5] * 4
    rates = [
        b.drop_path1.drop_prob for layer in swin.swin.layers for b in layer.blocks if hasattr(b.drop_path1, "drop_prob")
    ]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.1)
    if parameters:
        assert sum(p.numel() for p in swin.parameters()) == parameters
