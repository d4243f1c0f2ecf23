"""How fast nodes send to each other, and how far their clocks are apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from fastmoco.distributed.agreement import largest
from fastmoco.distributed.world import World

REPEATS, PINGS = 5, 8


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of `count` nodes once, in rounds in which each node has one partner at most."""
    ring: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    found = []
    for _ in range(len(ring) - 1):
        pairs = zip(ring[: len(ring) // 2], reversed(ring[len(ring) // 2 :]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        ring[1:] = [ring[-1], *ring[1:-1]]
    return found


def pair_bandwidths(
    world: World, speakers: Sequence[int], size: int, alive: Callable[[], None] = lambda: None
) -> dict[tuple[int, int], float]:
    """Bytes a second that each of two nodes sends the other in an all-reduce of `size` bytes, by the nodes' numbers.

    Node i is measured by rank `speakers[i]`; pairs of a round at the same time, as in training. To be called by all
    processes at once; a process knows the pairs that it is in, and calls `alive` after every round.
    """
    found = {}
    backend = dist.get_backend(world.group)
    for pairs in rounds(len(speakers)):
        # Torch makes a group with the help of all processes, also of those that will not be in it.
        groups = {pair: dist.new_group([speakers[node] for node in pair], backend=backend) for pair in pairs}
        for pair, group in groups.items():
            if world.rank in (speakers[pair[0]], speakers[pair[1]]):
                # Of n bytes, two processes send n each.
                found[pair] = size / _seconds(world, group, size)
                dist.destroy_process_group(group)
        alive()
    return found


def whole_bandwidth(world: World, size: int) -> float:
    """Bytes a second that this process sends in an all-reduce of `size` bytes over all processes."""
    return 2 * size * (world.size - 1) / world.size / _seconds(world, world.group, size)


def decision_seconds(world: World) -> float:
    """Seconds that all processes take to agree on a number, as they do in every step."""
    found = []
    for _ in range(4 * REPEATS):
        start = time.perf_counter()
        largest(world, 1)
        found.append(time.perf_counter() - start)
    return median(found)


def _seconds(world: World, group: Any, size: int) -> float:
    values = torch.zeros(max(1, size // 4), device=world.device)
    found = []
    for _ in range(1 + REPEATS):
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        found.append(time.perf_counter() - start)
    # The first also makes the connections.
    return median(found[1:])


def clock_offsets(world: World, speakers: Sequence[int]) -> dict[int, float]:
    """Seconds by which this node's clock is ahead of rank 0's, by its number; {} but on its speaker.

    Of several exchanges the quickest counts: the answer was given within it, so that half of it bounds the error. To
    be called by all processes at once.
    """
    found = {}
    for node, rank in enumerate(speakers):
        if rank == 0:
            if world.rank == 0:
                found[node] = 0.0
        elif world.rank == rank:
            found[node] = _ask(world)
        elif world.rank == 0:
            _answer(world, rank)
    return found


def _ask(world: World) -> float:
    exchanges = []
    for _ in range(PINGS):
        theirs = torch.zeros(1, dtype=torch.int64)
        before = time.time_ns()
        dist.send(theirs, dst=0, group=world.control)
        dist.recv(theirs, src=0, group=world.control)
        after = time.time_ns()
        exchanges.append((after - before, (before + after) / 2 - int(theirs)))
    return min(exchanges)[1] / 1e9


def _answer(world: World, rank: int) -> None:
    for _ in range(PINGS):
        dist.recv(torch.zeros(1, dtype=torch.int64), src=rank, group=world.control)
        dist.send(torch.tensor([time.time_ns()]), dst=rank, group=world.control)
