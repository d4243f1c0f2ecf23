"""The arithmetic every operation is done in: at least float32, whatever autocast would have chosen."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or unchanged where it is float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast leaves the operations on `tensor`'s device alone."""
    if not torch.amp.is_autocast_available(tensor.device.type):
        return contextlib.nullcontext()  # tensors without memory ("meta"), whose shapes are worked out
    return torch.autocast(tensor.device.type, enabled=False)
