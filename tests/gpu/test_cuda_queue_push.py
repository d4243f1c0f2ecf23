"""Pushing keys on a GPU: against a loop over rows, in a CUDA graph, without waiting."""

import pytest
import torch
from torch import Tensor

from cuda_checks import DEVICE, no_synchronisation, randn, replay
from fastmoco.ops.queue_push import queue_push_

pytestmark = pytest.mark.gpu
OPERATION = "queue_push"

# No key, one, a batch across the end of 101 rows, all rows, and more keys than rows, twice over.
COUNTS = [0, 1, 64, 101, 130, 250]


def pushed(bank: Tensor, pointer: int, keys: Tensor) -> tuple[Tensor, int]:
    """The definition: row by row, on the CPU."""
    bank = bank.clone().cpu()
    for key in keys.cpu():
        bank[pointer] = key.to(bank.dtype)
        pointer = (pointer + 1) % len(bank)
    return bank, pointer


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("width", [128, 5])
def test_it_is_row_by_row(implementation: str, width: int, count: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    bank, keys = randn(101, width, dtype=dtypes[0]), randn(count, width, dtype=dtypes[1])
    pointer = torch.tensor(77, device=DEVICE)
    want, next_row = pushed(bank, 77, keys)
    queue_push_(bank, pointer, keys, implementation=implementation)
    assert torch.equal(bank.cpu(), want) and int(pointer) == next_row


def test_a_graph_replays_it_from_where_the_pointer_is(implementation: str) -> None:
    bank, pointer = randn(4099, 128), torch.tensor(4000, device=DEVICE)
    keys = randn(64, 128)
    # Warmed up on copies: what compiles or allocates once must not do so while it is captured.
    queue_push_(bank.clone(), pointer.clone(), keys, implementation=implementation)
    want, row = bank, 4000
    for _ in range(3):
        want, row = pushed(want, row, keys)
    replay(lambda: queue_push_(bank, pointer, keys, implementation=implementation), times=3)
    assert torch.equal(bank.cpu(), want) and int(pointer) == row


def test_the_host_does_not_wait(implementation: str) -> None:
    bank, pointer, keys = randn(1024, 128), torch.zeros((), dtype=torch.int64, device=DEVICE), randn(32, 128)
    queue_push_(bank, pointer, keys, implementation=implementation)
    with no_synchronisation():
        queue_push_(bank, pointer, keys, implementation=implementation)


def test_rows_beyond_32_bit_offsets(implementation: str) -> None:
    """The last rows of 2^24 + 64, of 128 numbers each, and the first."""
    rows = (1 << 24) + 64 if DEVICE.type == "cuda" else 1 << 10
    bank = torch.zeros(rows, 128, dtype=torch.bfloat16, device=DEVICE)
    pointer, keys = torch.tensor(rows - 3, device=DEVICE), randn(5, 128, dtype=torch.bfloat16)
    queue_push_(bank, pointer, keys, implementation=implementation)
    assert torch.equal(bank[-3:], keys[:3]) and torch.equal(bank[:2], keys[3:]) and int(pointer) == 2
    assert not bank[2 : rows - 3].any()
