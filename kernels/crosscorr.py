"""Cross-correlation losses: all that is not a matrix product in four launches, the products left to torch in float32.

The formulas and their names are those of fastmoco/ops/crosscorr_forms.py. A program of `standardize` and `gradient`
owns a block of columns, in which the standardisation and its backward are sums over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoco.kernels.device import on_its_device

# BatchNorm's, which is what the standardisation replaces.
EPSILON = tl.constexpr(1e-5)

# Elements of two Gram matrices that a program of `products` multiplies, a multiple of its tile.
TILE, SPAN = 2048, 16384


@dataclass(frozen=True, slots=True)
class Plan:
    """A program's tile of (N, D), `rows` x `columns`, gone through from the first row to the last."""

    rows: int
    columns: int
    num_warps: int = 4


def plan(n: int) -> Plan:
    """The tile for a batch of n: 32 columns are 128 bytes of float32, and D = 2048 occupies 64 processors a stage."""
    return Plan(rows=min(64, triton.next_power_of_2(n)), columns=32)


@triton.jit
def _tile(pointer, first, column, n, d, ROWS: tl.constexpr):
    """Rows from `first` on of an (N, D) matrix in float32, with zeros beyond it, and which elements are in it."""
    row = first + tl.arange(0, ROWS)
    inside = (row < n)[:, None] & (column < d)[None, :]
    offset = row[:, None] * d + column[None, :]
    return tl.load(pointer + offset, mask=inside, other=0.0).to(tl.float32), offset, inside


@triton.jit
def _moments(z, column, n, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean and r = 1 / sqrt(variance + epsilon) of each column; the variance in a second pass, so that it is exact."""
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, n, ROWS):
        tile, _, _ = _tile(z, first, column, n, d, ROWS)
        total += tl.sum(tile, axis=0)
    mean = total / n
    square = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, n, ROWS):
        tile, _, inside = _tile(z, first, column, n, d, ROWS)
        centred = tl.where(inside, tile - mean[None, :], 0.0)
        square += tl.sum(centred * centred, axis=0)
    return mean, 1.0 / tl.sqrt(square / n + EPSILON)


@triton.jit
def standardize(z1, z2, s, r, diagonal, n, d, stages, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Both views' columns with mean 0 and variance 1, s (2, S, N, D), their factors r (2, S, D) and c (S, D)."""
    stage = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    z1 += stage * n * d
    z2 += stage * n * d
    s1 = s + stage * n * d
    s2 = s + (stages + stage) * n * d
    mean1, r1 = _moments(z1, column, n, d, ROWS, COLUMNS)
    mean2, r2 = _moments(z2, column, n, d, ROWS, COLUMNS)
    c = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, n, ROWS):
        tile1, offset, inside = _tile(z1, first, column, n, d, ROWS)
        tile2, _, _ = _tile(z2, first, column, n, d, ROWS)
        tile1 = tl.where(inside, (tile1 - mean1[None, :]) * r1[None, :], 0.0)
        tile2 = tl.where(inside, (tile2 - mean2[None, :]) * r2[None, :], 0.0)
        tl.store(s1 + offset, tile1, mask=inside)
        tl.store(s2 + offset, tile2, mask=inside)
        c += tl.sum(tile1 * tile2, axis=0)
    tl.store(r + stage * d + column, r1, mask=column < d)
    tl.store(r + (stages + stage) * d + column, r2, mask=column < d)
    tl.store(diagonal + stage * d + column, c / n, mask=column < d)


@triton.jit
def products(x, y, partial, size, SPAN: tl.constexpr, TILE: tl.constexpr):
    """Sums of x * y over SPAN elements each, of a stage's `size`."""
    stage = tl.program_id(1).to(tl.int64)
    total = tl.zeros([TILE], tl.float32)
    start = tl.program_id(0) * SPAN
    for first in range(start, start + SPAN, TILE):
        i = first + tl.arange(0, TILE)
        a = tl.load(x + stage * size + i, mask=i < size, other=0.0)
        total += a * tl.load(y + stage * size + i, mask=i < size, other=0.0)
    tl.store(partial + stage * tl.num_programs(0) + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def finish(partial, diagonal, loss, parts, d, off_diagonal, scale, whole, factor, TILE: tl.constexpr):
    """A stage's loss, of the sum of products times `factor`; `whole` is 1 where that includes the diagonal."""
    stage = tl.program_id(0).to(tl.int64)
    off = tl.zeros([TILE], tl.float32)
    for first in range(0, parts, TILE):
        i = first + tl.arange(0, TILE)
        off += tl.load(partial + stage * parts + i, mask=i < parts, other=0.0)
    on = tl.zeros([TILE], tl.float32)
    square = tl.zeros([TILE], tl.float32)
    for first in range(0, d, TILE):
        i = first + tl.arange(0, TILE)
        c = tl.load(diagonal + stage * d + i, mask=i < d, other=0.0)
        on += tl.where(i < d, (c - 1.0) * (c - 1.0), 0.0)
        square += c * c
    rest = tl.sum(off, axis=0) * factor - whole * tl.sum(square, axis=0)
    tl.store(loss + stage, scale * (tl.sum(on, axis=0) + off_diagonal * rest))


@triton.jit
def gradient(
    product1, product2, s, r, diagonal, n, d, stages, product_factor, diagonal_factor, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One view's gradient, in place of its product: through the standardisation, of

    dZ = factor * (product_factor * product + Z' * (diagonal_factor * c - 1)),  Z' the other view.
    """
    stage = tl.program_id(1).to(tl.int64)
    view = tl.program_id(2)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own = s + (view * stages + stage) * n * d
    other = s + ((1 - view) * stages + stage) * n * d
    product = product1 + stage * n * d
    if view == 1:
        product = product2 + stage * n * d
    weight = diagonal_factor * tl.load(diagonal + stage * d + column, mask=column < d, other=0.0) - 1.0
    scale = factor * tl.load(r + (view * stages + stage) * d + column, mask=column < d, other=0.0)
    total = tl.zeros([COLUMNS], tl.float32)
    along = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, n, ROWS):
        tile, _, _ = _tile(product, first, column, n, d, ROWS)
        tile = product_factor * tile + _tile(other, first, column, n, d, ROWS)[0] * weight[None, :]
        total += tl.sum(tile, axis=0)
        along += tl.sum(tile * _tile(own, first, column, n, d, ROWS)[0], axis=0)
    total /= n
    along /= n
    for first in range(0, n, ROWS):
        tile, offset, inside = _tile(product, first, column, n, d, ROWS)
        tile = product_factor * tile + _tile(other, first, column, n, d, ROWS)[0] * weight[None, :]
        tile -= total[None, :] + _tile(own, first, column, n, d, ROWS)[0] * along[None, :]
        tl.store(product + offset, tile * scale[None, :], mask=inside)


@on_its_device
def crosscorr(
    z1: Tensor, z2: Tensor, off_diagonal: float, scale: float, form: str, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (S,) of (S, N, D) pairs of any dtype up to float32, and the gradients to both, or two of (S, 0, D).

    `form` is "gram", through two N x N matrices, or "direct", through the D x D one. Float32 throughout: TF32 products
    only where `torch.backends.cuda.matmul` allows them. Deterministic: partial sums are kept and added in order.
    """
    stages, n, d = z1.shape
    z1, z2 = z1.contiguous(), z2.contiguous()

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=z1.device)

    tile = plan(n)
    options = {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.num_warps}
    blocks = triton.cdiv(d, tile.columns)
    s, r, diagonal, loss = new(2, stages, n, d), new(2, stages, d), new(stages, d), new(stages)
    standardize[(blocks, stages)](z1, z2, s, r, diagonal, n, d, stages, **options)

    if form == "gram":
        x, y = torch.bmm(s.view(-1, n, d), s.view(-1, n, d).mT).view(2, stages, n, n)
    else:
        x = y = torch.bmm(s[0].mT, s[1]).mul_(1 / n)
        # Left out, rather than subtracted, it leaves the small sum exact.
        x.diagonal(dim1=1, dim2=2).zero_()
    size = x[0].numel()
    partial = new(stages, triton.cdiv(size, SPAN))
    products[(partial.shape[1], stages)](x, y, partial, size, SPAN=SPAN, TILE=TILE, num_warps=4)
    gram = form == "gram"
    finish[(stages,)](
        partial, diagonal, loss, partial.shape[1], d, off_diagonal, scale, float(gram), 1 / n**2 if gram else 1.0,
        TILE=1024, num_warps=4,
    )  # fmt: skip
    if not gradients:
        return loss, new(stages, 0, d), new(stages, 0, d)

    dz1, dz2 = new(stages, n, d), new(stages, n, d)
    torch.bmm(*((y, s[0]) if gram else (s[1], x.mT)), out=dz1)
    torch.bmm(*((x, s[1]) if gram else (s[0], x)), out=dz2)
    gradient[(blocks, stages, 2)](
        dz1, dz2, s, r, diagonal, n, d, stages,
        off_diagonal / n if gram else off_diagonal, 1 - off_diagonal if gram else 1.0, 2 * scale / n,
        **options,
    )  # fmt: skip
    return loss, dz1, dz2
