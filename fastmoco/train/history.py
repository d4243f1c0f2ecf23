"""The metrics of steps, gathered on the device and read at intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastmoco.distributed.collectives import gather
from fastmoco.distributed.world import World


class History:
    """The losses of the steps since the last read, as a (capacity, columns) float64 tensor on the device.

    A row's columns are the mean over its micro-batches of `loss` (the sum), each named part, `top1` and `top5`: the
    shares of queries with no and with fewer than five negatives more similar than their key, and `embedding_std`: the
    standard deviation of the normalised query embeddings over the batch, averaged over dimensions and multiplied by
    sqrt(D), so that 1 is a uniform spread over the sphere and 0 is collapse.
    """

    def __init__(self, names: Sequence[str], capacity: int, world: World) -> None:
        self.columns = ["loss", *names, "top1", "top5", "embedding_std"]
        self._world = world
        self._values = torch.zeros(capacity, len(self.columns), dtype=torch.float64, device=world.device)
        self._rows = 0

    @torch.no_grad()
    def add(self, losses: Mapping[str, Tensor], query: Tensor, rank: Tensor, *, divisor: int) -> None:
        """Add a micro-batch's losses, divided by `divisor`, to the current row.

        `query` (N, D) normalised, `rank` (N,) negatives more similar than the key.
        """
        parts = torch.stack([value.detach().double() for value in losses.values()])
        spread = query.std(dim=0, unbiased=False).mean().double() * query.shape[1] ** 0.5
        found = torch.stack([(rank < places).double().mean() for places in (1, 5)])
        self._values[self._rows] += torch.cat([parts.sum()[None], parts, found, spread[None]]) / divisor

    def next_row(self) -> None:
        """End the current row: the step is done."""
        self._rows += 1

    def read(self) -> list[dict[str, float]]:
        """The rows since the last read, means over all processes, on the host: here alone a step's metrics synchronise.

        Every process calls it after the same step, and has the same rows.
        """
        every = gather(self._world, self._values[: self._rows], kind="metrics")
        rows = every.view(self._world.size, self._rows, len(self.columns)).mean(dim=0).tolist()
        self._values.zero_()
        self._rows = 0
        return [dict(zip(self.columns, row, strict=True)) for row in rows]
