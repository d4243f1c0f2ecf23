"""What processes send each other, with the gradients that it needs; every function counts its bytes in `World.sent`.

Bytes are those that one process sends, of the algorithm that moves the least: a gather of n bytes from each of W
processes sends (W - 1) n, a sum of n bytes 2 n (W - 1) / W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.distributed.world import World

# Its name before torch 2.14.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@torch.no_grad()
def gather(world: World, rows: Tensor, *, kind: str) -> Tensor:
    """The rows (N, ...) of every process, in the order of their ranks: (W N, ...), contiguous, without gradient.

    Every process gives equally many.
    """
    if world.alone:
        return rows
    return start_gather(world, rows, kind=kind).wait()


class Arriving:
    """Rows on their way to this process, by torch's `work`, None where they are there; `wait` gives them."""

    def __init__(self, work: Any, rows: Tensor) -> None:
        self._work, self._rows = work, rows

    def wait(self) -> Tensor:
        """The rows, once they are there; on a GPU the stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        return self._rows


@torch.no_grad()
def start_gather(world: World, rows: Tensor, *, kind: str) -> Arriving:
    """Begin `gather`, to be waited for when the rows are needed."""
    if world.alone:
        return Arriving(None, rows)
    rows = rows.detach().contiguous()
    out = rows.new_empty((world.size * len(rows), *rows.shape[1:]))
    world.sent[kind] += (world.size - 1) * rows.nbytes
    return Arriving(_all_gather_single(out, rows, group=world.group, async_op=True), out)


def sum_bytes(world: World, x: Tensor) -> int:
    """Bytes that a process sends in a sum of `x` over all of them."""
    return 2 * x.nbytes * (world.size - 1) // world.size


def start_sum(world: World, x: Tensor, *, kind: str, op: Any = None) -> Any:
    """Begin to replace `x` by its sum over all processes, or another `op` of torch.distributed; None in a world of one.

    `wait()` of what is returned has it done.
    """
    if world.alone:
        return None
    world.sent[kind] += sum_bytes(world, x)
    return dist.all_reduce(x, op=op or dist.ReduceOp.SUM, group=world.group, async_op=True)


class _GatherForSharedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World, kind: str) -> Tensor:
        ctx.world, ctx.rows = world, len(rows)
        return gather(world, rows, kind=kind)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own = gradient[ctx.world.rank * ctx.rows : (ctx.world.rank + 1) * ctx.rows]
        return own * ctx.world.size, None, None


def gather_for_shared_loss(world: World, rows: Tensor, *, kind: str) -> Tensor:
    """`gather` with a gradient, for a loss that every process computes alike from the gathered rows (W N, ...).

    Each then has the gradient of all rows at hand, and takes its own rows' from it times W, since gradients are
    averaged over the processes afterwards: nothing is sent on the way back. For a loss that differs between processes
    this would be wrong.
    """
    if world.alone:
        return rows
    out: Tensor = _GatherForSharedLoss.apply(rows, world, kind)
    return out
