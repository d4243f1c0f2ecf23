"""What processes of a torch.distributed job that is not ours send each other for the adapters."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoco.distributed import collectives
from fastmoco.distributed.world import World


def world() -> World:
    """The processes of torch.distributed's default group; a world of one where that is not in use."""
    if dist.is_available() and dist.is_initialized():
        return World(rank=dist.get_rank(), size=dist.get_world_size())
    return World()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        return gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Each process's loss has the rows of all: what they want of this one's rows is the sum. Copied, as others may
        # be given the same gradient.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        first = dist.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows]


def gather(rows: Tensor) -> Tensor:
    """The rows (N, ...) of all W processes in the order of their ranks, (W N, ...), with the gradient of losses that
    differ between processes: the sum of all of theirs."""
    if world().alone:
        return rows
    out: Tensor = _Gather.apply(rows)
    return out


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (N, ...) of all W processes in the order of their ranks, (W N, ...), without gradient."""
    return collectives.gather(world(), rows, kind="rows")


@torch.no_grad()
def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Of the rows (N, ...) of all W processes those numbered `index` (W N,) int64, a permutation that is the same on
    all, this process's part of it: (N, ...). Each row is sent once, to the one process that wants it."""
    here = world()
    if here.alone:
        return rows[index]
    rank, size, count = here.rank, here.size, len(rows)
    wanted = index.view(size, count)
    mine = wanted.div(count, rounding_mode="floor") == rank
    # For each process in turn, my rows that it wants, in its order.
    sent = rows.detach()[wanted[mine] - rank * count].contiguous()
    owners = wanted[rank].div(count, rounding_mode="floor")
    sizes_in = torch.bincount(owners, minlength=size).tolist()
    received = torch.empty_like(sent)
    dist.all_to_all_single(_bytes(received), _bytes(sent), sizes_in, mine.sum(dim=1).tolist())
    # They came by owner, and within one in the order in which they are wanted.
    out = torch.empty_like(received)
    out[torch.argsort(owners, stable=True)] = received
    return out


@torch.no_grad()
def shuffle_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """As many rows (N, ...) of all processes, at random, as there are `rows` here; and the index with which `take_rows`
    restores them."""
    here = world()
    order = torch.randperm(len(rows) * here.size, device=rows.device)
    if not here.alone:
        dist.broadcast(order, src=0)
    return take_rows(rows, order), torch.argsort(order)


class _MeanOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exact: bool) -> Tensor:
        ctx.exact = exact
        x = x / dist.get_world_size()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient / dist.get_world_size()
        if ctx.exact:
            dist.all_reduce(gradient)
        return gradient, None


def mean_of_all(x: Tensor, *, exact: bool = True) -> Tensor:
    """The mean of `x` over the processes, for a loss that all compute alike from it.

    Its gradient is the mean of theirs; with `exact` false that of a plain all_reduce, which autograd does not see: one
    over the number of processes of it.
    """
    if world().alone:
        return x
    mean: Tensor = _MeanOfAll.apply(x, exact)
    return mean


def _bytes(rows: Tensor) -> Tensor:
    """`rows` (N, ...) as (N, bytes of one) uint8, the same memory: what every backend sends, of any dtype."""
    return rows.view(len(rows), -1).view(torch.uint8)
