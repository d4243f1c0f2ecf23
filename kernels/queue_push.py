"""Appending keys to a ring of rows whose place the device alone knows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmoco.kernels.device import on_its_device

# Elements of a program's tile.
TILE = 2048


def plan(d: int) -> tuple[int, int]:
    """Rows and columns of a program's tile for keys (N, D)."""
    columns = min(triton.next_power_of_2(d), TILE)
    return TILE // columns, columns


@triton.jit
def write_rows(bank, pointer, keys, first, n, size, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Keys from `first` on, each over the row that is its own; the pointer is only read."""
    key = first + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (key < n)[:, None] & (column < d)[None, :]
    row = (tl.load(pointer) + key) % size
    values = tl.load(keys + key[:, None] * d + column[None, :], mask=inside)
    tl.store(bank + row[:, None] * d + column[None, :], values.to(bank.dtype.element_ty), mask=inside)


@triton.jit
def advance(pointer, n, size):
    """A launch of its own: the rows' programs have all read the pointer by then."""
    tl.store(pointer, (tl.load(pointer) + n) % size)


@on_its_device
def queue_push(bank: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """bank[(pointer + i) % K] <- keys[i] for the last K of the N keys; pointer <- (pointer + N) % K.

    `bank` (K, D), contiguous, and `keys` (N, D) of any dtypes up to float32, `pointer` 0-d int64, all on one device,
    whose host is not waited for. Deterministic: no row is written twice.
    """
    assert bank.is_contiguous()
    (size, d), n = bank.shape, keys.shape[0]
    if n == 0:
        return
    first = max(0, n - size)
    rows, columns = plan(d)
    write_rows[(triton.cdiv(n - first, rows), triton.cdiv(d, columns))](
        bank, pointer, keys.contiguous(), first, n, size, d, ROWS=rows, COLUMNS=columns, num_warps=4
    )
    advance[(1,)](pointer, n, size, num_warps=1)
