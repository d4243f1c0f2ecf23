"""The queue against a list that forgets its oldest entries."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from fastmoco.errors import UserError
from fastmoco.queue import Queue


def numbered(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(count, 3).contiguous()


@pytest.mark.parametrize("sizes", [[3] * 9, [1, 7, 2, 5, 7, 3], [7, 7, 7], [4, 0, 6]])
def test_no_key_is_dropped_or_repeated(sizes: list[int]) -> None:
    queue = Queue(7, 3, seed=1)
    kept: deque[float] = deque(maxlen=7)
    ring = queue.bank[:, 0].tolist()
    at = 0
    for count in sizes:
        keys = numbered(100 + len(kept) * 10 + at, count)
        queue.push(keys)
        for value in keys[:, 0].tolist():
            ring[at] = value
            at = (at + 1) % 7
            kept.append(value)
        assert queue.bank[:, 0].tolist() == ring
        assert queue.pointer.item() == at
    assert sorted(kept) == sorted(value for value in ring if value >= 100)


def test_a_batch_above_the_queue_is_refused() -> None:
    queue = Queue(4, 3)
    with pytest.raises(ValueError, match="at most 4"):
        queue.push(numbered(0, 5))
    with pytest.raises(ValueError, match="3"):
        queue.push(torch.zeros(2, 5))
    with pytest.raises(UserError, match="queue-size"):
        Queue(0, 3)


def test_it_starts_with_unit_vectors_of_its_seed() -> None:
    bank = Queue(50, 16, seed=3).bank
    assert torch.allclose(bank.norm(dim=1), torch.ones(50), atol=1e-6)
    assert torch.equal(bank, Queue(50, 16, seed=3).bank)
    assert not torch.equal(bank, Queue(50, 16, seed=4).bank)


def test_it_is_in_the_state_dict() -> None:
    queue = Queue(5, 3)
    queue.push(numbered(1, 4))
    other = Queue(5, 3, seed=9)
    other.load_state_dict(queue.state_dict())
    other.push(numbered(9, 2))
    assert other.bank[:, 0].tolist() == [10.0, 2.0, 3.0, 4.0, 9.0]
