"""Each image comes once an epoch, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import numpy as np
import pytest

from fastmoco.data.order import Order
from fastmoco.errors import UserError


@pytest.mark.parametrize(("samples", "batch"), [(10, 3), (12, 4), (5, 5), (3, 7)])
def test_every_image_once_an_epoch_and_the_first_ones_fill_it_up(samples: int, batch: int) -> None:
    order = Order(samples, batch, seed=1, drop_last=False)
    for epoch in range(3):
        batches = [order.batch(epoch * order.batches_per_epoch + i) for i in range(order.batches_per_epoch)]
        assert {slots.epoch for slots in batches} == {epoch}
        assert {len(slots.indices) for slots in batches} == {batch}
        indices, turns, places = (np.concatenate([slots[i] for slots in batches]) for i in (1, 2, 3))
        assert sorted(indices[turns == 0].tolist()) == list(range(samples))
        assert places.tolist() == list(range(len(indices)))
        # Each time that an image comes again it has another turn, so its views are others.
        assert len(set(zip(indices.tolist(), turns.tolist(), strict=True))) == len(indices)
        np.testing.assert_array_equal(indices[samples:], np.resize(indices[:samples], len(indices))[samples:])


def test_drop_last_gives_full_batches_without_repeats() -> None:
    order = Order(10, 3, seed=1)
    assert order.batches_per_epoch == 3
    indices = np.concatenate([order.batch(t).indices for t in range(3)])
    assert len(indices) == 9
    assert len(set(indices.tolist())) == 9
    assert order.left_out == 1 and Order(9, 3, seed=1).left_out == Order(10, 3, seed=1, drop_last=False).left_out == 0
    assert not any(order.batch(t).turns.any() for t in range(3))


def test_it_is_a_function_of_seed_and_epoch() -> None:
    forward = [Order(20, 4, seed=7).batch(t).indices.tolist() for t in range(15)]
    order = Order(20, 4, seed=7)
    backward = [order.batch(t).indices.tolist() for t in reversed(range(15))][::-1]
    assert forward == backward
    assert forward[:5] != forward[5:10]
    assert forward != [Order(20, 4, seed=8).batch(t).indices.tolist() for t in range(15)]


@pytest.mark.parametrize("shards", [2, 3, 6])
@pytest.mark.parametrize("drop_last", [True, False])
def test_shards_share_out_the_same_batches(shards: int, drop_last: bool) -> None:
    whole = Order(31, 6, seed=2, drop_last=drop_last)
    parts = [Order(31, 6, seed=2, drop_last=drop_last, shard=i, shards=shards) for i in range(shards)]
    assert {part.batches_per_epoch for part in parts} == {whole.batches_per_epoch}
    assert {part.local_size for part in parts} == {6 // shards}
    for t in range(2 * whole.batches_per_epoch):
        for column in range(1, 4):
            together = np.concatenate([part.batch(t)[column] for part in parts])
            np.testing.assert_array_equal(together, whole.batch(t)[column])


def test_a_substitute_comes_from_half_an_epoch_on() -> None:
    order = Order(10, 2, seed=0)
    sequence = order.permutation(3).tolist()
    assert order.substitute(3, 1, bad={sequence[1]}) == sequence[6]
    assert order.substitute(3, 8, bad={sequence[8], sequence[3]}) == sequence[4]
    with pytest.raises(UserError, match="no image is left"):
        order.substitute(0, 0, bad=set(range(10)))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="lower --batch-size"):
        Order(3, 4, seed=0)
    assert Order(3, 4, seed=0, drop_last=False).batches_per_epoch == 1
    with pytest.raises(UserError, match="numbered from 0"):
        Order(8, 4, seed=0, shard=2, shards=2)
    with pytest.raises(UserError, match="evenly to 3 processes"):
        Order(8, 4, seed=0, shards=3)
