"""The package's ResNets beside torchvision's: names, shapes, first weights, outputs and gradients."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torchvision import models

from fastmoco.models.resnet import ResNet
from fastmoco.train.config import Arch


def pair(arch: str, **options: bool) -> tuple[ResNet, models.ResNet]:
    """The package's and torchvision's, drawn from the same seed."""
    torch.manual_seed(3)
    ours, after = ResNet(arch, **options), torch.rand(1)
    torch.manual_seed(3)
    theirs = getattr(models, arch)(weights=None, **options)
    assert torch.equal(after, torch.rand(1)), "what is drawn after the network is not what it was"
    return ours, theirs


@pytest.mark.parametrize("zero_init_residual", [True, False])
@pytest.mark.parametrize("arch", get_args(Arch))
def test_a_seed_gives_torchvisions_weights(arch: str, zero_init_residual: bool) -> None:
    ours, theirs = pair(arch, zero_init_residual=zero_init_residual)
    own, other = ours.state_dict(), theirs.state_dict()
    assert [*own] == [*other] and all(torch.equal(own[name], other[name]) for name in own)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_maps_gradients_and_statistics_are_torchvisions(arch: str, training: bool) -> None:
    """In float64, at sides that no stage divides evenly."""
    ours, theirs = (net.double().train(training) for net in pair(arch))
    x = torch.rand(3, 3, 61, 45, dtype=torch.float64)
    for net in (ours, theirs):
        net(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    names = ("layer1", "layer2", "layer3", "layer4")
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    for name, stage in zip(names, ours.stages(x), strict=True):
        y = theirs.get_submodule(name)(y)
        torch.testing.assert_close(stage, y, rtol=1e-8, atol=1e-8)
    for (name, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None, name
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-7, atol=1e-7 * other.grad.abs().max().item())
    for own_buffer, other_buffer in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(own_buffer, other_buffer, rtol=1e-8, atol=1e-8)
