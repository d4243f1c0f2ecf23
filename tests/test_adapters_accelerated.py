"""Accelerated: the network that it wraps, to bfloat16's rounding or exactly."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from fastmoco.adapters.accelerated import Accelerated
from fastmoco.models.convolution import Convolution
from fastmoco.models.max_pool import MaxPool
from fastmoco.models.norm import FusedBatchNorm2d
from fastmoco.models.resnet import BasicBlock, Bottleneck

# What each becomes.
KINDS = {
    nn.Conv2d: Convolution,
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.MaxPool2d: MaxPool,
    models.resnet.BasicBlock: BasicBlock,
    models.resnet.Bottleneck: Bottleneck,
}


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


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_resnet_becomes_the_packages_with_the_same_weights(arch: str) -> None:
    torch.manual_seed(0)
    plain = getattr(models, arch)(num_classes=4)
    fast = Accelerated(copy.deepcopy(plain), "fp32")
    theirs, ours = [*plain.modules()], [*fast.module.modules()]
    for kind, own in KINDS.items():
        changed = [part for part, before in zip(ours, theirs, strict=True) if type(before) is kind]
        assert len(changed) > 0 or kind.__name__ in ("BasicBlock", "Bottleneck")
        assert all(isinstance(part, own) and isinstance(part, kind) for part in changed)
    assert any(isinstance(part, (BasicBlock, Bottleneck)) for part in ours)
    # In float64: in float32 rounding alone makes 3e-4 of a ResNet-50.
    plain, fast = plain.double(), fast.double()
    x = torch.rand(4, 3, 64, 64, dtype=torch.float64)
    out, expected = fast(x), plain(x)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    own, other = dict(fast.module.named_parameters()), dict(plain.named_parameters())
    assert [*own] == [*other]
    for name, parameter in other.items():
        assert parameter.grad is not None
        size = parameter.grad.abs().max().item()
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-4, atol=1e-5 * size)
    mean, other_mean = fast.module.get_buffer("bn1.running_mean"), plain.get_buffer("bn1.running_mean")
    torch.testing.assert_close(mean, other_mean, rtol=1e-8, atol=1e-8)


def test_a_copy_and_a_traced_network_go_on() -> None:
    plain = models.resnet18(num_classes=4).eval()
    x = torch.rand(2, 3, 40, 40)
    copied = copy.deepcopy(Accelerated(copy.deepcopy(plain), "fp32").eval())
    with warnings.catch_warnings():
        # That tracing is deprecated is no concern of those who have a traced network.
        warnings.simplefilter("ignore")
        traced = Accelerated(torch.jit.trace(plain, x), "fp32")
    for fast in (copied, traced):
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-4)
