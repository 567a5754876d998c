"""Layers of the joined batch, on one process; several are compared in test_train.py."""

import pytest
import torch
from torch import nn

from pamm.nn.joined import JoinedBatchNorm2d


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """The same values in memory as (B, L, C): for B = 1 their strides look like those of another layout."""
    return x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("inputs", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize("outputs", [torch.Tensor.contiguous, channels_last])
def test_batch_norm_has_the_same_gradients_in_every_layout(training, images, inputs, outputs):
    torch.manual_seed(0)
    norm = JoinedBatchNorm2d(8).train(training)
    nn.init.normal_(norm.weight)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    x, gradient = torch.randn(images, 8, 3, 5), torch.randn(images, 8, 3, 5)
    ours = inputs(x).requires_grad_()
    found = torch.autograd.grad(norm(ours), [ours, norm.weight, norm.bias], outputs(gradient))
    wide = x.double().requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in (norm.weight, norm.bias))
    if training:
        mean, variance = wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)
    plain = (wide - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt() * weight[:, None, None]
    expected = torch.autograd.grad(plain + bias[:, None, None], [wide, weight, bias], gradient.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
