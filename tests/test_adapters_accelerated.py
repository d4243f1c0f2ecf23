"""Accelerated: the network that it wraps, to bfloat16's rounding or exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmoco.adapters.accelerated import Accelerated


class Seen(nn.Module):
    """A convolution that keeps what it was given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        self.seen = [x.is_contiguous(memory_format=torch.channels_last), out.dtype]
        return out.mean(dim=(2, 3))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_pictures_are_channels_last_and_products_of_that_type(precision: Any, dtype: torch.dtype) -> None:
    plain = Seen()
    fast = Accelerated(copy.deepcopy(plain), precision)
    x = torch.rand(2, 3, 9, 9)
    out = fast(x)
    assert isinstance(fast.module, Seen) and fast.module.seen == [True, dtype] and out.dtype == torch.float32
    assert fast.module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    tolerance = 2e-2 if precision == "bf16" else 1e-6
    torch.testing.assert_close(out, plain(x), rtol=tolerance, atol=tolerance)
    out.sum().backward()
    assert fast.module.conv.weight.grad is not None and fast.module.conv.weight.grad.dtype == torch.float32
    assert [*fast.state_dict()] == ["module.conv.weight", "module.conv.bias"]


def test_a_resnet_becomes_the_packages_with_the_same_weights() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    plain = models.resnet18(num_classes=4)
    fast = Accelerated(copy.deepcopy(plain), "fp32")
    x = torch.rand(4, 3, 64, 64)
    out, expected = fast(x), plain(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    expected.square().sum().backward()
    own, other = dict(fast.module.named_parameters()), dict(plain.named_parameters())
    assert [*own] == [*other]
    for name, parameter in other.items():
        assert parameter.grad is not None
        size = parameter.grad.abs().max().item()
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-3, atol=1e-3 * size)
    mean, other_mean = fast.module.get_buffer("bn1.running_mean"), plain.get_buffer("bn1.running_mean")
    torch.testing.assert_close(mean, other_mean, rtol=1e-4, atol=1e-5)
