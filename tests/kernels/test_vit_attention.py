"""A ViT's attention in training: by the C kernel as by torch, or by timm's own form where the kernel cannot stand for it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pamm.kernels import REWRITES, accelerate
from pamm.kernels import attention as module
from pamm.models.backbone import ViT, create_backbone
from tiny import BACKBONE

pytestmark = pytest.mark.skipif(module.KERNEL.unavailable() is not None, reason="no C compiler here")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """As on a processor where the kernel is the faster one; notes every run of it, forward and backward."""
    monkeypatch.setattr(module.matrix, "SLOW_PRODUCTS", True)
    monkeypatch.setattr(module, "SMALLEST", 1)
    noted, run = [], module._run

    def note(name: str, **rest) -> None:
        noted.append(name)
        run(name, **rest)

    monkeypatch.setattr(module, "_run", note)
    return noted


def backbone() -> ViT:
    torch.manual_seed(0)
    return create_backbone(replace(BACKBONE, drop_path_rate=0.0), (48, 64)).train()


def accelerated(vit: ViT) -> ViT:
    """A copy whose attention alone is replaced."""
    vit = copy.deepcopy(vit)
    rewrites = [rewrite for rewrite in REWRITES if rewrite.name == "attention"]
    assert len(accelerate(vit, training=True, rewrites=rewrites).replaced["attention"]) == len(vit.vit.blocks)
    return vit


def step(model, vit: ViT) -> dict[str, Tensor]:
    """Outputs of the stages and every gradient; `model` is the backbone or its compiled form."""
    torch.manual_seed(1)
    stages = model(torch.randn(2, 3, 48, 64))
    vit.zero_grad()
    sum((stage.float() * torch.randn(stage.shape)).sum() for stage in stages).backward()
    outputs = {f"stage {i}": stage.detach().float() for i, stage in enumerate(stages)}
    return outputs | {name: p.grad for name, p in vit.named_parameters()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= tolerance * expected[name].abs().max() + 1e-4, name


@pytest.mark.parametrize("form", ["as it is", "recomputed", "compiled"])
def test_a_training_step_is_that_of_torchs_attention(form, calls):
    plain = backbone()
    expected = step(plain, plain)
    assert not calls
    vit = accelerated(backbone())
    vit.set_grad_checkpointing(form == "recomputed")
    torch._dynamo.reset()
    model = torch.compile(vit, fullgraph=True, backend="aot_eager") if form == "compiled" else vit
    assert_close(step(model, vit), expected, 1e-4)
    again = len(vit.vit.blocks) if form == "recomputed" else 0
    assert calls.count("attention") - again == calls.count("attention_backward") == len(vit.vit.blocks)


def test_a_training_step_under_autocast(calls):
    vit = accelerated(backbone())
    expected = step(vit, vit)
    expected = {name: value.clone() for name, value in expected.items()}
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(step(vit, vit), expected, 0.05)
    assert calls.count("attention") == calls.count("attention_backward") == len(vit.vit.blocks)


def test_attention_with_dropout_is_timms(calls):
    vit = accelerated(backbone())
    for block in vit.vit.blocks:
        block.attn.attn_drop.p = 0.5
    image = torch.randn(1, 3, 48, 64)
    assert not torch.equal(vit(image)[-1], vit(image)[-1]) and not calls
    vit.eval()
    assert torch.equal(vit(image)[-1], vit(image)[-1]) and calls
