"""The queue against a list that forgets its oldest entries."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch

from fastmoco.errors import UserError
from fastmoco.ops import dispatch
from fastmoco.ops.queue_push import queue_push_
from fastmoco.queue import Queue
from runs import NoSync


def numbered(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(count, 3).contiguous()


@pytest.mark.parametrize("sizes", [[3] * 9, [1, 7, 2, 5, 7, 3], [7, 7, 7], [4, 0, 6], [8, 3], [5, 23, 14, 1], [15]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_last_keys_stay_in_their_order(sizes: list[int], dtype: torch.dtype) -> None:
    queue = Queue(7, 3, seed=1, dtype=dtype)
    kept: deque[float] = deque(maxlen=7)
    ring = queue.bank[:, 0].tolist()
    at = pushed = 0
    for count in sizes:
        # Numbers that bfloat16 holds.
        keys = numbered(100 + pushed, count)
        queue.push(keys)
        pushed += count
        for value in keys[:, 0].tolist():
            ring[at] = value
            at = (at + 1) % 7
            kept.append(value)
        assert queue.bank[:, 0].tolist() == ring
        assert (queue.bank == queue.bank[:, :1]).all(dim=1).sum() == min(7, pushed)
        assert queue.pointer.item() == at
    assert queue.bank.dtype == dtype
    assert sorted(kept) == sorted(value for value in ring if value >= 100)


def test_keys_are_rounded_to_the_banks_dtype_and_lose_their_gradient() -> None:
    queue = Queue(4, 3, dtype=torch.bfloat16)
    keys = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    queue.push(keys)
    assert torch.equal(queue.bank[:2], keys.detach().bfloat16())
    assert not queue.bank.requires_grad


def test_mistakes_are_refused_before_anything_is_written() -> None:
    bank, pointer, keys = torch.zeros(4, 3), torch.zeros((), dtype=torch.int64), torch.ones(2, 3)
    meta = torch.ones(2, 3, device="meta")
    for arguments, message in (
        ((bank, pointer, torch.ones(2, 5)), r"not \(4, 3\) and \(2, 5\)"),
        ((bank, pointer, torch.ones(3)), r"keys \(N, D\)"),
        ((torch.zeros(0, 3), pointer, keys), "no rows"),
        ((bank, pointer, keys.int()), "must be floating-point"),
        ((bank, pointer.int(), keys), "pointer must be 0-d int64, not torch.int32"),
        ((bank, pointer[None], keys), r"of shape \(1,\)"),
        ((bank, pointer, meta), "on one device, not cpu, cpu and meta"),
        ((bank.clone().requires_grad_(), pointer, keys), "the bank requires a gradient"),
        ((bank, pointer, bank[:2]), "bank 0 and keys 0 share memory"),
    ):
        with pytest.raises(UserError, match=message):
            queue_push_(*arguments)
    assert not bank.any() and pointer.item() == 0
    with pytest.raises(UserError, match="queue-size"):
        Queue(0, 3)


def test_a_bank_with_gaps_takes_keys_too() -> None:
    memory, pointer = torch.zeros(3, 4), torch.tensor(2)
    queue_push_(memory[:, ::2], pointer, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert memory.tolist() == [[3, 0, 4, 0], [0, 0, 0, 0], [1, 0, 2, 0]]


def test_it_is_an_operation_that_torch_library_accepts() -> None:
    for count in (0, 2, 9):
        arguments = (torch.zeros(4, 3), torch.tensor(3), torch.randn(count, 3), "reference")
        torch.library.opcheck(torch.ops.fastmoco.queue_push_.default, arguments)


def test_it_compiles_without_a_graph_break() -> None:
    def step(bank: torch.Tensor, pointer: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        queue_push_(bank, pointer, 2 * keys)
        return bank.sum() + pointer

    keys = torch.randn(3, 2)
    results = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        bank, pointer = torch.ones(4, 2), torch.tensor(3)
        results.append([run(bank, pointer, keys), bank, pointer])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_graph_that_saved_the_bank_notices() -> None:
    queue, x = Queue(4, 3), torch.ones(4, 3, requires_grad=True)
    product = (queue.bank * x).sum()
    queue.push(numbered(0, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_nothing_is_read_back_to_the_host() -> None:
    queue = Queue(5, 3)
    with NoSync():
        for count in (2, 4, 11):
            queue.push(numbered(0, count))


def test_what_is_read_inside_an_operation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch of the test above, on implementations that it must fail."""
    for read in (
        lambda pointer: pointer.item(),
        lambda pointer: bool(pointer),
        lambda pointer: pointer.tolist(),
        lambda pointer: pointer.numpy(),
        lambda pointer: torch.ones(1)[pointer[None] > 0],
        lambda pointer: torch.arange(5)[: pointer + 1],
    ):

        def reading(bank: torch.Tensor, pointer: torch.Tensor, keys: torch.Tensor, read: Any = read) -> None:
            read(pointer)

        monkeypatch.setitem(dispatch._registry, "queue_push", {"reference": dispatch.Implementation(reading, None, "")})
        queue = Queue(5, 3)
        with pytest.raises(AssertionError, match="synchronises"), NoSync():
            queue.push(numbered(0, 2))


def test_it_starts_with_unit_vectors_of_its_seed() -> None:
    bank = Queue(50, 16, seed=3).bank
    assert torch.allclose(bank.norm(dim=1), torch.ones(50), atol=1e-6)
    assert torch.equal(bank, Queue(50, 16, seed=3).bank)
    assert not torch.equal(bank, Queue(50, 16, seed=4).bank)
    assert torch.equal(bank.bfloat16(), Queue(50, 16, seed=3, dtype=torch.bfloat16).bank)


def test_it_is_in_the_state_dict() -> None:
    queue = Queue(5, 3)
    queue.push(numbered(1, 4))
    other = Queue(5, 3, seed=9)
    other.load_state_dict(queue.state_dict())
    other.push(numbered(9, 2))
    assert other.bank[:, 0].tolist() == [10.0, 2.0, 3.0, 4.0, 9.0]
