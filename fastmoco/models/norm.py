"""Residual blocks whose normalisations, additions and ReLUs are one pass each, where that is the faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastmoco.ops import dispatch
from fastmoco.ops.batch_norm import batch_norm


class NormalizedBasicBlock(BasicBlock):
    """torchvision's block of two 3 x 3 convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, planes, H / stride, W / stride)."""
        y = normalize_relu(self.bn1, self.relu, self.conv1(x))
        return normalize_relu(self.bn2, self.relu, self.conv2(y), _shortcut(self.downsample, x))


class NormalizedBottleneck(Bottleneck):
    """torchvision's block of a 1 x 1, a 3 x 3 and a 1 x 1 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 4 planes, H / stride, W / stride)."""
        y = normalize_relu(self.bn1, self.relu, self.conv1(x))
        y = normalize_relu(self.bn2, self.relu, self.conv2(y))
        return normalize_relu(self.bn3, self.relu, self.conv3(y), _shortcut(self.downsample, x))


def use_fused_norms(module: nn.Module) -> None:
    """Makes every residual block of `module` one of the above, its parameters and its place as they are."""
    for part in module.modules():
        if type(part) is BasicBlock:
            part.__class__ = NormalizedBasicBlock
        elif type(part) is Bottleneck:
            part.__class__ = NormalizedBottleneck


def normalize_relu(norm: nn.Module, relu: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`relu(norm(x) + residual)` of a map (N, C, H, W), and the running statistics with it.

    Under torch each is a pass over the map and a rounding of it, and a quarter of a step on a CPU. Maps in bfloat16 and
    channels-last memory format that a plain BatchNorm2d in training takes on a CPU go through ops.batch_norm; all
    else through the modules.
    """
    if isinstance(norm, nn.BatchNorm2d) and _fuses(norm, x, residual):
        return _fused(norm, x, residual)
    y = norm(x)
    if residual is not None:
        y += residual
    out: Tensor = relu(y)
    return out


def _shortcut(downsample: nn.Module | None, x: Tensor) -> Tensor:
    if downsample is None:
        return x
    out: Tensor = downsample(x)
    return out


def _fuses(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None) -> bool:
    if not (norm.training and type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats):
        return False
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or norm.momentum is None or dispatch.native is None:
        return False
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape):
        return False
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and x.numel() > x.shape[1]


def _fused(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None) -> Tensor:
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    y, statistics = batch_norm(x, norm.weight, norm.bias, residual=residual, relu=True, epsilon=norm.eps)
    mean, _, variance = statistics.unbind()
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance, norm.momentum)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    return y
