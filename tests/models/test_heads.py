"""The head without its large map equals the head with it."""

import pytest
import torch
import torch.nn.functional as F

from pamm.models.heads import ConvHead, upsampled_conv3x3


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


def test_head_equals_its_plain_form():
    torch.manual_seed(0)
    head = ConvHead(16, 3).eval()
    head.norm.running_mean.normal_()
    head.norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 16, 6, 5)
    large = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
    plain = head.predict(F.gelu(head.norm(head.conv(large))))
    torch.testing.assert_close(head(x), plain, rtol=1e-4, atol=1e-5)
