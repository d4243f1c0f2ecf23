"""The Triton push against the reference: the same bits, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from fastmoco.ops.queue_push import queue_push_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("bank_dtype", "key_dtype"), [(torch.float32,) * 2, (torch.float16, torch.float32)])
# One row or column; rows that no tile divides; more columns than a tile has.
@pytest.mark.parametrize(("size", "dim"), [(1, 3), (7, 1), (67, 130), (5, 2050)])
def test_rows_and_pointer(size: int, dim: int, bank_dtype: torch.dtype, key_dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    bank = torch.randn(size, dim).to(DEVICE, bank_dtype)
    pointer = torch.tensor(size // 2, device=DEVICE)
    expected, expected_pointer = bank.clone(), pointer.clone()
    # Nothing, up to the end, over it, all rows at once, more keys than rows.
    for n in (0, 1, size - size // 2, size - 1, size, size + 3, 2 * size + 1):
        keys = torch.randn(n, dim).to(DEVICE, key_dtype)
        queue_push_(bank, pointer, keys, implementation="triton")
        queue_push_(expected, expected_pointer, keys, implementation="reference")
        assert torch.equal(bank, expected) and torch.equal(pointer, expected_pointer), n


def test_keys_with_gaps() -> None:
    bank, pointer = torch.zeros(4, 3, device=DEVICE), torch.tensor(3, device=DEVICE)
    queue_push_(bank, pointer, torch.arange(12.0, device=DEVICE).view(3, 4).T[::2], implementation="triton")
    assert bank.tolist() == [[2, 6, 10], [0, 0, 0], [0, 0, 0], [0, 4, 8]] and pointer.item() == 1


def test_a_bank_with_gaps() -> None:
    memory, pointer = torch.zeros(3, 4, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
    queue_push_(memory[:, ::2], pointer, torch.ones(2, 2, device=DEVICE), implementation="triton")
    assert memory.tolist() == [[1, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]] and pointer.item() == 2
