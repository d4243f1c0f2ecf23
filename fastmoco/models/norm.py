"""Normalisations that the addition and the ReLU behind them are one pass with, where that is the faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmoco.ops import dispatch
from fastmoco.ops.batch_norm import batch_norm
from fastmoco.ops.library import left_to_torch
from fastmoco.ops.running_statistics import track


class FusedBatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d, by ops.batch_norm for maps that `_fuses`, where the addition and the ReLU behind it can be
    part of it."""

    def forward(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """A map (N, C, H, W) normalised; with `relu`, of maps that `_fuses`, `relu(norm(x) + residual)`."""
        if not relu and not _fuses(self, x, residual):
            y = super().forward(x)
            return y if residual is None else y + residual
        y, statistics = batch_norm(x, self.weight, self.bias, residual=residual, relu=relu, epsilon=self.eps)
        self.track(statistics)
        return y

    def track(self, statistics: Tensor) -> None:
        """The running statistics go on with those of a batch, as ops.batch_norm gives them."""
        mean, variance, batches = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None and variance is not None and batches is not None and self.momentum is not None
        track(mean, variance, batches, statistics, self.momentum)

    def takes_batches(self) -> bool:
        """Whether it is set to take the statistics of batches and to follow them, as ops.batch_norm does."""
        if not (self.training and self.affine and self.track_running_stats) or self.momentum is None:
            return False
        mean = self.running_mean
        return mean is not None and mean.dtype == torch.float32


def normalize_relu(norm: nn.Module, relu: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """`relu(norm(x) + residual)` of a map (N, C, H, W), and the running statistics with it.

    Under torch each is a pass over the map and a rounding of it, and a quarter of a bfloat16 step on a CPU. Maps in
    bfloat16, and large ones in float32, in channels-last memory format, that a FusedBatchNorm2d in training takes on a
    CPU go through ops.batch_norm; all else goes through the modules.
    """
    if isinstance(norm, FusedBatchNorm2d) and type(relu) is nn.ReLU and _fuses(norm, x, residual):
        # By a call of the module: what shares out weights over processes brings a module's together when it is called.
        fused: Tensor = norm(x, residual, relu=True)
        return fused
    y = norm(x)
    if residual is not None:
        y += residual
    out: Tensor = relu(y)
    return out


# Elements from which on a float32 map is fused: forward and backward take 0.65 of torch's time where it has millions,
# 0.8 to 0.95 at a quarter of a million, and 1.2 at 32,768 (measured, one thread).
LARGE = 2**17


def _fuses(norm: FusedBatchNorm2d, x: Tensor, residual: Tensor | None) -> bool:
    if not norm.takes_batches():
        return False
    if x.device.type != "cpu" or x.ndim != 4 or dispatch.native is None or left_to_torch():
        return False
    if x.shape[1] != norm.num_features or norm.weight.device != x.device:
        return False
    if x.dtype != torch.bfloat16 and not (x.dtype == torch.float32 and x.numel() >= LARGE):
        return False
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape or residual.device != x.device):
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and x.numel() > x.shape[1]
