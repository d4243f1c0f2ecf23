"""Any network in channels-last memory format and bfloat16: `from fastmoco.adapters.accelerated import Accelerated`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import resnet as theirs

from fastmoco.models.convolution import Convolution
from fastmoco.models.max_pool import MaxPool
from fastmoco.models.norm import FusedBatchNorm2d
from fastmoco.models.resnet import BasicBlock, Bottleneck
from fastmoco.precision import default_precision


class _BasicBlock(BasicBlock, theirs.BasicBlock):
    """torchvision's block, run as this package's."""


class _Bottleneck(Bottleneck, theirs.Bottleneck):
    """torchvision's block, run as this package's."""


_OURS = {
    nn.Conv2d: Convolution,
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.MaxPool2d: MaxPool,
    theirs.BasicBlock: _BasicBlock,
    theirs.Bottleneck: _Bottleneck,
}


class Accelerated(nn.Module):
    """`module`, whose weights and pictures lie channels-last, and which multiplies bfloat16 under autocast: what
    networks of convolutions are fastest in on processors and GPUs that have it. Its convolutions, its BatchNorms, its
    max pooling and, of torchvision's ResNets, its residual blocks become this package's, in place, with the same
    parameters. What it returns is float32.

    precision: bf16, fp32, or auto, which takes bf16 where the device multiplies it. Weights and their gradients stay
    float32. State dicts have the module's names behind "module.", as under DDP.
    """

    def __init__(self, module: nn.Module, precision: Literal["auto", "bf16", "fp32"] = "auto") -> None:
        super().__init__()
        for part in module.modules():
            # No others: a traced module is lost even by being given its own class.
            if type(part) in _OURS:
                part.__class__ = _OURS[type(part)]
        self.module = module.to(memory_format=torch.channels_last)
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        """`module` of `x` (N, C, H, W), as float32."""
        precision = default_precision(x.device.type) if self.precision == "auto" else self.precision
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out: Tensor = self.module(x.contiguous(memory_format=torch.channels_last))
        return out.float()
