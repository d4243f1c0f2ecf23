"""Small decisions that all processes have to take alike, over the host's memory: no GPU is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from fastmoco.distributed.world import World
from fastmoco.errors import UserError

T = TypeVar("T")


def largest(world: World, *numbers: int) -> tuple[int, ...]:
    """Each number's largest value in any process."""
    if world.alone:
        return numbers
    words = torch.tensor(numbers, dtype=torch.int64)
    world.sent["control"] += 2 * words.nbytes * (world.size - 1) // world.size
    dist.all_reduce(words, op=dist.ReduceOp.MAX, group=world.control)
    return tuple(words.tolist())


def texts(world: World, text: str) -> list[str]:
    """What every process says, by rank."""
    if world.alone:
        return [text]
    mine = torch.frombuffer(bytearray(text.encode(errors="surrogateescape")) or bytearray(1), dtype=torch.uint8)
    length = len(mine) if text else 0
    (longest,) = largest(world, len(mine))
    padded = torch.zeros(longest + 8, dtype=torch.uint8)
    padded[:8] = torch.tensor([length]).view(torch.uint8)
    padded[8 : 8 + len(mine)] = mine
    every = [torch.empty_like(padded) for _ in range(world.size)]
    world.sent["control"] += (world.size - 1) * padded.nbytes
    dist.all_gather(every, padded, group=world.control)
    return [
        bytes(one[8 : 8 + int(one[:8].view(torch.int64))].tolist()).decode(errors="surrogateescape") for one in every
    ]


def everywhere(world: World, action: Callable[[], T]) -> T:
    """What `action` returns, after every process has done it.

    Raises UserError in all of them where it does in any, with what each of those says and on which rank and host.
    """
    result: T | None = None
    problem: UserError | None = None
    try:
        result = action()
    except UserError as error:
        problem = error
    (failed,) = largest(world, problem is not None)
    if failed:
        agree_to_raise(world, problem)
    return result  # type: ignore[return-value]


def agree_to_raise(world: World, problem: UserError | None) -> None:
    """Raise in every process what went wrong in some: `problem` here, or None. At least one has one."""
    if world.alone:
        assert problem is not None
        raise problem
    kinds = texts(world, type(problem).__name__ if problem else "")
    said = texts(world, f"{problem}" if problem else "")
    hosts = texts(world, world.host)
    different = dict.fromkeys(text for text in said if text)
    if len(different) == 1 and all(said):
        message = said[0]
    else:
        message = "\n".join(f"rank {r} on {hosts[r]}: {text}" for r, text in enumerate(said) if text)
    first = next(kind for kind in kinds if kind)
    if problem is not None and type(problem).__name__ == first:
        raise type(problem)(message) from problem
    raise _known(first)(message)


def _known(name: str) -> type[UserError]:
    """The kind of UserError called `name`, so that all processes raise the same."""
    pending = [UserError]
    while pending:
        kind = pending.pop()
        if kind.__name__ == name:
            return kind
        pending += kind.__subclasses__()
    return UserError


def first_then_others(world: World, action: Callable[[], T]) -> T:
    """What `action` returns: in rank 0, which does it first, and then in the others, who find done what it did.

    Raises UserError in all where it does in any.
    """
    if world.alone:
        return action()
    result: T | None = None

    def as_first() -> None:
        nonlocal result
        if world.first:
            result = action()

    def as_other() -> None:
        nonlocal result
        if not world.first:
            result = action()

    everywhere(world, as_first)
    everywhere(world, as_other)
    return result  # type: ignore[return-value]
