"""The arithmetic every operation is done in: at least float32, whatever autocast would have chosen."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or unchanged where it is float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which autocast leaves the operations on `tensor`'s device alone."""
    return torch.autocast(tensor.device.type, enabled=False)
