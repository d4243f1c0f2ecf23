"""The negatives: a ring of the last K keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastmoco.errors import UserError


class Queue(nn.Module):
    """The last `size` keys, as rows of the float32 buffer `bank` (K, D); the oldest is overwritten first.

    `pointer` is the row that the next key takes, a 0-d int64 buffer on the device, so that a push needs no
    host synchronisation. The bank starts as Gaussian vectors of unit length drawn with `seed`.
    """

    bank: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, *, seed: int = 0) -> None:
        super().__init__()
        if size < 1:
            raise UserError(f"--queue-size must be at least 1, not {size}")
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("bank", normalize(torch.randn(size, dim, generator=generator), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Append `keys` (N, D), in order, over the oldest rows; N may be anything up to K.

        Raises ValueError where N is above K, which would drop keys, or D is not the bank's.
        """
        size, dim = self.bank.shape
        if keys.ndim != 2 or keys.shape[1] != dim or keys.shape[0] > size:
            raise ValueError(f"queue: (N, {dim}) keys with N at most {size}, not {tuple(keys.shape)}")
        rows = (self.pointer + torch.arange(keys.shape[0], device=keys.device)) % size
        self.bank.index_copy_(0, rows, keys.to(self.bank.dtype))
        self.pointer.add_(keys.shape[0]).remainder_(size)
