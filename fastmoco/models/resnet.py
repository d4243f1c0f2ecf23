"""Residual networks (He et al. 2016, arXiv:1512.03385) with the names, shapes and initial weights of torchvision's.

The layers are those of this package, and torchvision, which takes torch's compiler with it, is not imported: half the
time of a start. As in torchvision, the stride of a bottleneck is in its 3 x 3 convolution.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fastmoco.models.convolution import Convolution
from fastmoco.models.convolve_norm import convolve_normalize_relu
from fastmoco.models.max_pool import MaxPool
from fastmoco.models.norm import FusedBatchNorm2d


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    expansion = 1
    downsample: nn.Module | None

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, width, 3, stride)
        self.bn1 = FusedBatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _convolution(width, width, 3)
        self.bn2 = FusedBatchNorm2d(width)
        self.downsample = _projection(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, width, H / stride, W / stride)."""
        y = convolve_normalize_relu(self.conv1, self.bn1, self.relu, x)
        return convolve_normalize_relu(self.conv2, self.bn2, self.relu, y, _shortcut(self.downsample, x))


class Bottleneck(nn.Module):
    """A 1 x 1, a 3 x 3 and a 1 x 1 convolution beside a shortcut."""

    expansion = 4
    downsample: nn.Module | None

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, width, 1)
        self.bn1 = FusedBatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = FusedBatchNorm2d(width)
        self.conv3 = _convolution(width, width * self.expansion, 1)
        self.bn3 = FusedBatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, 4 width, H / stride, W / stride)."""
        y = convolve_normalize_relu(self.conv1, self.bn1, self.relu, x)
        y = convolve_normalize_relu(self.conv2, self.bn2, self.relu, y)
        return convolve_normalize_relu(self.conv3, self.bn3, self.relu, y, _shortcut(self.downsample, x))


ARCHS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int], int]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 64),
}
"""Of each architecture the kind of its blocks, how many of them each of the four stages has, and the channels of the
first convolution, which are those inside the blocks of stage 1."""


class ResNet(nn.Module):
    """The network `arch` of `ARCHS`, with a last layer `fc` for ImageNet's 1,000 classes, which has its part in what a
    seed draws.

    `zero_init_residual` starts the last BatchNorm of each block at 0, so that each block starts as the identity.
    Raises KeyError for another `arch`.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, arch: str, *, zero_init_residual: bool = False) -> None:
        super().__init__()
        block, depths, channels = ARCHS[arch]
        self.conv1 = Convolution(3, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = FusedBatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = MaxPool(3, stride=2, padding=1)
        width = channels
        for stage, depth in enumerate(depths):
            blocks = [block(channels, width, stride=2 if stage else 1)]
            channels = width * block.expansion
            blocks += [block(channels, width) for _ in range(depth - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            width *= 2
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Linear(channels, 1000)
        self.width = channels
        for part in self.modules():
            # In this order, and after the layers have drawn weights of their own, as torchvision does: one seed gives
            # both the same network.
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(part, (BasicBlock, Bottleneck)):
                last = part.bn2 if isinstance(part, BasicBlock) else part.bn3
                nn.init.zeros_(cast(nn.Parameter, last.weight))

    def stages(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`x` (N, 3, H, W) -> the outputs of residual stages 1 to 4, (N, C_s, H_s, W_s) each."""
        x = self.maxpool(convolve_normalize_relu(self.conv1, self.bn1, self.relu, x))
        s1 = self.layer1(x)
        s2 = self.layer2(s1)
        s3 = self.layer3(s2)
        return s1, s2, s3, self.layer4(s3)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (N, 3, H, W) -> (N, 1000), or what stands in the place of `fc` makes of (N, width)."""
        y: Tensor = self.fc(self.avgpool(self.stages(x)[-1]).flatten(1))
        return y


def _convolution(channels: int, width: int, kernel: int, stride: int = 1) -> Convolution:
    return Convolution(channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)


def _projection(channels: int, width: int, stride: int) -> nn.Sequential | None:
    """What brings a block's input to the shape of its output; None where it has that."""
    if stride == 1 and channels == width:
        return None
    return nn.Sequential(_convolution(channels, width, 1, stride), FusedBatchNorm2d(width))


def _shortcut(downsample: nn.Module | None, x: Tensor) -> Tensor:
    if downsample is None:
        return x
    out: Tensor = downsample(x)
    return out
