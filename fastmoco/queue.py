"""The negatives: a ring of the last K keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastmoco.errors import UserError
from fastmoco.ops.queue_push import queue_push_


class Queue(nn.Module):
    """The last `size` keys, as rows of the buffer `bank` (K, D) of `dtype`; the oldest is overwritten first.

    `pointer` is the row that the next key takes, a 0-d int64 buffer on the device, so that a push needs no
    host synchronisation. The bank starts as Gaussian vectors of unit length drawn with `seed`, the same for every
    dtype up to rounding.
    """

    bank: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if size < 1:
            raise UserError(f"--queue-size must be at least 1, not {size}")
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("bank", normalize(torch.randn(size, dim, generator=generator), dim=1).to(dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def push(self, keys: Tensor) -> None:
        """Append `keys` (N, D), in order, over the oldest rows; of more than K the last K stay.

        Raises ValueError where D is not the bank's.
        """
        queue_push_(self.bank, self.pointer, keys)
