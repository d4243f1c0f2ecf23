"""Normalisations that the addition and the ReLU behind them are one pass with, where that is the faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmoco.ops import dispatch
from fastmoco.ops.batch_norm import batch_norm
from fastmoco.ops.library import transformed


class FusedBatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d, which the addition and the ReLU behind it can be part of."""

    def forward(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """A map (N, C, H, W) normalised; with `relu`, of maps that `_fuses`, `relu(norm(x) + residual)`."""
        if not relu:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        y, statistics = batch_norm(x, self.weight, self.bias, residual=residual, relu=True, epsilon=self.eps)
        mean, _, variance = statistics.unbind()
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return y


def normalize_relu(norm: nn.Module, relu: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`relu(norm(x) + residual)` of a map (N, C, H, W), and the running statistics with it.

    Under torch each is a pass over the map and a rounding of it, and a quarter of a step on a CPU. Maps in bfloat16 or
    float32 and channels-last memory format that a FusedBatchNorm2d in training takes on a CPU go through
    ops.batch_norm; all else goes through the modules, and so do torch.func's transforms.
    """
    if isinstance(norm, FusedBatchNorm2d) and _fuses(norm, x, residual):
        # By a call of the module: what shares out weights over processes brings a module's together when it is called.
        fused: Tensor = norm(x, residual, relu=True)
        return fused
    y = norm(x)
    if residual is not None:
        y += residual
    out: Tensor = relu(y)
    return out


def _fuses(norm: FusedBatchNorm2d, x: Tensor, residual: Tensor | None) -> bool:
    if not (norm.training and norm.affine and norm.track_running_stats):
        return False
    if x.device.type != "cpu" or norm.momentum is None or dispatch.native is None or transformed():
        return False
    if x.dtype not in (torch.bfloat16, torch.float32):
        return False
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape):
        return False
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and x.numel() > x.shape[1]
