"""Images sent to other processes for the key encoder, and what it made of them sent back, paired as before."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.distributed.collectives import Arriving
from fastmoco.distributed.world import World


def draw_order(seed: int, micro_batch: int, rank: int, rows: int) -> Tensor:
    """A random permutation of `rows`, int64 on the CPU: a pure function of its arguments."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x5_0FF1E], counter=[0, 0, rank, micro_batch]))
    return torch.from_numpy(rng.permutation(rows))


class Exchange:
    """Gives every process of `world` an equal part of this one's N rows, of random images; it gets as many.

    `order` (N,) int64, on the rows' device, is the permutation in which they are sent. Where W does not divide N, who
    gets one more goes round with the sender, so that N come back to each. Each row is sent once, as the bytes it is,
    by one all-to-all. In a world of one the rows are only permuted.
    """

    def __init__(self, world: World, order: Tensor) -> None:
        self.world, self.order = world, order
        base, more = divmod(len(order), world.size)
        to_others = range(world.size)
        self.sizes_out = [base + ((other - world.rank) % world.size < more) for other in to_others]
        self.sizes_in = [base + ((world.rank - other) % world.size < more) for other in to_others]

    def start(self, rows: Tensor) -> Arriving:
        """Begin to send `rows` (N, ...), counted as "shuffle"; in channels-last memory format they stay so."""
        channels_last = rows.ndim == 4 and rows.is_contiguous(memory_format=torch.channels_last)
        if channels_last:
            rows = rows.permute(0, 2, 3, 1)
        own = rows.index_select(0, self.order)
        out, work = self._all_to_all(own, self.sizes_out, self.sizes_in, "shuffle")
        return Arriving(work, out.permute(0, 3, 1, 2) if channels_last else out)

    def bring_back(self, *features: Tensor) -> list[Tensor]:
        """Features (N, ...) of the rows that arrived, each of any dtype -> those of this process's, in its order.

        Counted as "unshuffle". All go together, as they are, and contiguous. Without gradient.
        """
        widths = [prod(feature.shape[1:]) * feature.element_size() for feature in features]
        rows = [_bytes(feature) for feature in features]
        own, work = self._all_to_all(torch.cat(rows, dim=1), self.sizes_in, self.sizes_out, "unshuffle")
        if work is not None:
            work.wait()
        paired = torch.empty_like(own).index_copy_(0, self.order, own)
        return [
            part.contiguous().view(feature.dtype).view(feature.shape)
            for part, feature in zip(paired.split(widths, dim=1), features, strict=True)
        ]

    def _all_to_all(self, rows: Tensor, sizes_out: list[int], sizes_in: list[int], kind: str) -> tuple[Tensor, Any]:
        if self.world.alone:
            return rows, None
        sent = _bytes(rows)
        out = torch.empty_like(sent)
        self.world.sent[kind] += (len(sent) - sizes_out[self.world.rank]) * sent.shape[1]
        work = dist.all_to_all_single(out, sent, sizes_in, sizes_out, group=self.world.group, async_op=True)
        return out.view(rows.dtype).view(rows.shape), work


def _bytes(rows: Tensor) -> Tensor:
    """`rows` (N, ...) as (N, bytes of one) uint8: what every backend sends, of any dtype."""
    return rows.detach().contiguous().view(len(rows), -1).view(torch.uint8)
