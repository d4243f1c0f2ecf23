"""Max pooling by this package's own code, where that is the faster."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastmoco.ops import dispatch
from fastmoco.ops.library import left_to_torch
from fastmoco.ops.max_pool import fits, max_pool_unchecked


class MaxPool(nn.MaxPool2d):
    """torch's MaxPool2d; channels-last maps in bfloat16 or float32 on a CPU go through ops/max_pool.py.

    The values and which places get a gradient are torch's. Traced and exported networks have torch's operation, and so
    have torch.func's transforms.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        if self._own(x):
            kernel, stride, padding = _pair(self.kernel_size), _pair(self.stride), _pair(self.padding)
            if fits(x.shape, kernel, stride, padding) and _few_windows(kernel, stride):
                return max_pool_unchecked(x, kernel, stride, padding)
        y: Tensor = super().forward(x)
        return y

    def _own(self, x: Tensor) -> bool:
        if dispatch.native is None or self.ceil_mode or self.return_indices or self.dilation not in (1, (1, 1)):
            return False
        # torch takes other numbers and sequences too.
        if not all(map(_known, (self.kernel_size, self.stride, self.padding))):
            return False
        if not x.is_cpu or x.dtype not in (torch.bfloat16, torch.float32) or x.ndim != 4:
            return False
        # What is mapped is not to be asked for its memory format.
        if left_to_torch() or not x.is_contiguous(memory_format=torch.channels_last):
            return False
        # torch refuses some that have no numbers.
        return x.numel() != 0


def _known(of: object) -> bool:
    sides = of if isinstance(of, (tuple, list)) else (of, of)
    return len(sides) == 2 and all(isinstance(side, int) for side in sides)


def _pair(of: int | tuple[int, ...]) -> tuple[int, ...]:
    return (of, of) if isinstance(of, int) else tuple(of)


def _few_windows(kernel: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether so few windows are over a place that to ask each for its gradient takes less than to hand it out: of a
    kernel of 3 x 3 and stride 2 four at most, 0.6 of torch's time, of 5 x 5 and stride 1 25, several times of it."""
    return math.prod(-(-covered // step) for covered, step in zip(kernel, stride, strict=True)) <= 6
