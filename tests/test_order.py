"""Each image comes once an epoch, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import numpy as np
import pytest

from fastmoco.data.order import Order
from fastmoco.errors import UserError


@pytest.mark.parametrize(("samples", "batch"), [(10, 3), (12, 4), (5, 5)])
def test_every_image_once_an_epoch(samples: int, batch: int) -> None:
    order = Order(samples, batch, seed=1, drop_last=False)
    for epoch in range(3):
        batches = [order.batch(epoch * order.batches_per_epoch + i) for i in range(order.batches_per_epoch)]
        assert {number for number, _ in batches} == {epoch}
        assert sorted(np.concatenate([indices for _, indices in batches]).tolist()) == list(range(samples))


def test_drop_last_gives_full_batches_without_repeats() -> None:
    order = Order(10, 3, seed=1)
    assert order.batches_per_epoch == 3
    indices = np.concatenate([order.batch(t)[1] for t in range(3)])
    assert len(indices) == 9
    assert len(set(indices.tolist())) == 9


def test_it_is_a_function_of_seed_and_epoch() -> None:
    forward = [Order(20, 4, seed=7).batch(t)[1].tolist() for t in range(15)]
    order = Order(20, 4, seed=7)
    backward = [order.batch(t)[1].tolist() for t in reversed(range(15))][::-1]
    assert forward == backward
    assert forward[:5] != forward[5:10]
    assert forward != [Order(20, 4, seed=8).batch(t)[1].tolist() for t in range(15)]


def test_too_few_images() -> None:
    with pytest.raises(UserError, match="lower --batch-size"):
        Order(3, 4, seed=0)
    assert Order(3, 4, seed=0, drop_last=False).batches_per_epoch == 1
