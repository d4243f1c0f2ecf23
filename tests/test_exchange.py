"""Key images go to other processes, each once, and what is made of them comes back to the image it belongs to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmoco.distributed.exchange import Exchange, draw_order
from fastmoco.distributed.world import World
from worlds import in_world


def images(rank: int, rows: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Every image is of one number, its own among those of all processes."""
    number = torch.arange(rows) + rank * rows
    image = number.to(dtype).view(-1, 1, 1, 1).expand(rows, 3, 4, 2)
    return image.contiguous(memory_format=torch.channels_last)


def _there_and_back(world: World, rows: int) -> tuple[Tensor, list[Tensor]]:
    order = draw_order(7, 5, world.rank, rows)
    exchange = Exchange(world, order)
    own = images(world.rank, rows)
    there = exchange.start(own).wait()
    assert there.shape == own.shape and there.dtype == own.dtype
    assert there.is_contiguous(memory_format=torch.channels_last)
    # Other dtypes and shapes, none of which may be rounded to another's.
    number = there[:, 0, 0, 0]
    third = number.double() / 3
    features = [third.float()[:, None].expand(-1, 3), third, there.bfloat16()]
    back = exchange.bring_back(*features)
    assert [(b.shape, b.dtype) for b in back] == [(f.shape, f.dtype) for f in features]
    return number, back


@pytest.mark.parametrize(("size", "rows"), [(1, 5), (2, 5), (3, 6), (3, 7), (4, 6), (4, 3)])
def test_every_image_is_somewhere_once_and_its_features_come_back(size: int, rows: int) -> None:
    results = in_world(size, _there_and_back, rows) if size > 1 else [_there_and_back(World(), rows)]
    everywhere = torch.cat([number for number, _ in results])
    assert everywhere.sort().values.tolist() == list(range(size * rows))
    for rank, (number, (floats, doubles, maps)) in enumerate(results):
        own = torch.arange(rows) + rank * rows
        assert torch.equal(doubles, own.double() / 3)
        assert torch.equal(floats, (own.double() / 3).float()[:, None].expand(-1, 3))
        assert torch.equal(maps, images(rank, rows, torch.bfloat16))
        kept = sum(rank * rows <= n < (rank + 1) * rows for n in number.tolist())
        assert kept == -(-rows // size), "no process keeps more than an even part of its own"


def _bytes_sent(world: World, dtype: torch.dtype, rows: int) -> int:
    Exchange(world, draw_order(0, 0, world.rank, rows)).start(images(world.rank, rows, dtype)).wait()
    return world.sent["shuffle"]


def test_an_image_is_sent_once_and_compact() -> None:
    size, rows = 4, 8
    image = 3 * 4 * 2
    gathered = {width: (size - 1) * rows * image * width for width in (2, 4)}
    sent = in_world(size, _bytes_sent, torch.float16, rows)
    assert sent == [6 * image * 2] * size
    assert all(4 * n <= gathered[2] and 8 * n <= gathered[4] for n in sent)
    # Where the parts are not even, less is sent rather than more.
    assert all(4 * n <= 3 * 7 * image * 2 for n in in_world(size, _bytes_sent, torch.float16, 7))


def test_orders_depend_on_seed_micro_batch_and_process_alone() -> None:
    first = draw_order(1, 2, 3, 40)
    assert first.dtype == torch.int64 and torch.equal(first.sort().values, torch.arange(40))
    assert torch.equal(draw_order(1, 2, 3, 40), first)
    others = [draw_order(2, 2, 3, 40), draw_order(1, 3, 3, 40), draw_order(1, 2, 4, 40)]
    assert not any(torch.equal(other, first) for other in others)
