"""The head without its large map against the head as it is written."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pamm.kernels import conv_head
from pamm.kernels import head as kernel
from pamm.kernels.conv_head import SmallMapHead, upsampled_conv3x3
from pamm.models.pamm import ConvHead
from pamm.nn.checkpointing import checkpointed
from pamm.nn.joined import JoinedBatchNorm2d

needs_compiler = pytest.mark.skipif(kernel.KERNEL.unavailable() is not None, reason="no C compiler here")


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 6), (8, 3)])
@pytest.mark.parametrize("scale", [2, 4])
def test_convolution_of_the_upsampled_map_output_and_gradients(size, scale):
    torch.manual_seed(0)
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    ours = upsampled_conv3x3(x, weight, scale)
    large = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    plain = F.conv2d(large, weight, padding=1)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad((ours * direction).sum(), (x, weight)),
        torch.autograd.grad((plain * direction).sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def faster(head: ConvHead, *, kernel: bool = True) -> SmallMapHead:
    """A copy without the large map; in torch where `kernel` is off."""
    found = conv_head.replacement(copy.deepcopy(head))
    if not kernel:
        found.suits_kernel = lambda feature: False
    return found


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_head_equals_its_plain_form(kernel, gradient, bias):
    torch.manual_seed(0)
    head = ConvHead(16, 3, bias=bias).eval()
    head.norm.running_mean.normal_()
    head.norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 16, 6, 5)
    with torch.set_grad_enabled(gradient):
        torch.testing.assert_close(faster(head, kernel=kernel)(x), head(x), rtol=1e-4, atol=1e-5)


def trained_step(head: ConvHead, x: Tensor) -> dict[str, Tensor]:
    """One pass in training: logits, gradients and what the normalisation keeps."""
    x = x.clone().requires_grad_()
    y = head(x)
    y.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    return {"logits": y.detach(), "x": x.grad, **gradients, **dict(head.norm.named_buffers(prefix="norm"))}


@needs_compiler
@pytest.mark.parametrize("bias", [False, True])
def test_training_is_that_of_the_plain_form(bias, monkeypatch):
    torch.manual_seed(0)
    head = ConvHead(32, 5, bias=bias).train()
    torch.nn.init.normal_(head.norm.weight)
    torch.nn.init.normal_(head.norm.bias)
    x, calls = torch.randn(2, 32, 6, 5), []
    monkeypatch.setattr(kernel, "trained", lambda *given, form=kernel.trained: calls.append(1) or form(*given))
    ours = trained_step(faster(head), x)
    assert calls
    torchs = trained_step(faster(head, kernel=False), x)
    plain = trained_step(copy.deepcopy(head), x)
    assert len(calls) == 1 and ours.keys() == torchs.keys() == plain.keys()
    for name, expected in plain.items():
        for found in (ours[name], torchs[name]):
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def average_over_all_batches(head: ConvHead) -> None:
    head.norm.momentum = None


def predict_without_bias(head: ConvHead) -> None:
    head.predict = torch.nn.Conv2d(32, 5, 1, bias=False)


def forget_statistics(head: ConvHead) -> None:
    head.norm = JoinedBatchNorm2d(32, track_running_stats=False)


def normalise_as_torch(head: ConvHead) -> None:
    head.norm = torch.nn.BatchNorm2d(32)


def normalise_groups(head: ConvHead) -> None:
    head.norm = torch.nn.GroupNorm(8, 32)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.norm.eval(),
        average_over_all_batches,
        predict_without_bias,
        forget_statistics,
        normalise_as_torch,
        normalise_groups,
    ],
    ids=["frozen", "average", "no bias", "no statistics", "torch's", "groups"],
)
def test_a_head_that_was_changed_is_what_it_was_changed_to(change):
    """In training, twice, and then in inference: against the layers as they are written."""
    torch.manual_seed(0)
    plain = ConvHead(32, 5).train()
    change(plain)
    head = faster(plain)
    for _ in range(2):
        x = torch.randn(2, 32, 6, 5)
        large = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
        expected = plain.predict(F.gelu(plain.norm(plain.conv(large))))
        torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)
    for found, buffer in zip(head.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, buffer, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = plain.eval().predict(F.gelu(plain.norm(plain.conv(large))))
        torch.testing.assert_close(head.eval()(x), expected, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_recomputing_the_head_tracks_the_statistics_once():
    torch.manual_seed(0)
    head, x = faster(ConvHead(32, 5).train()), torch.randn(2, 32, 6, 5)
    expected = trained_step(copy.deepcopy(head), x)
    checkpointed(head, x.requires_grad_()).square().mean().backward()
    for name, found in {**dict(head.norm.named_buffers(prefix="norm")), "x": x.grad}.items():
        torch.testing.assert_close(found, expected[name])


@needs_compiler
def test_a_trained_head_compiles_to_one_graph():
    torch.manual_seed(0)
    head, x = faster(ConvHead(32, 5).train()), torch.randn(2, 32, 6, 5)
    expected = trained_step(copy.deepcopy(head), x)
    compiled = copy.deepcopy(head)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for name, found in trained_step(compiled, x).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6)
