"""InfoNCE's loss and gradients in one sweep over the bank: attention whose values are its keys.

The bank is cut into splits, so that a batch of 32 queries occupies the whole device. Each program of the sweep leaves
its split's running maximum, sum and weighted sum of rows; the merge adds the splits in order, so that results are the
same every time. Exponentials are powers of two: temperatures are folded into the factor log2(e) / t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoco.kernels.device import on_its_device, processors

# torch.nn.functional.normalize's.
NORM_EPSILON = tl.constexpr(1e-12)
# The least float32 rather than -inf, so that a query all of whose negatives are skipped gives 0 and not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the sweep is tiled: `queries` x `rows` logits a step, `chunk` columns a product, the bank in `splits`."""

    queries: int
    rows: int
    chunk: int
    chunks: int
    splits: int
    rows_per_split: int
    prefetch: bool
    num_warps: int
    num_stages: int


def plan(n: int, k: int, d: int, dtype: torch.dtype, skipping: bool, processors: int) -> Plan:
    """The tiling for N queries and a (K, D) bank of `dtype` on a device of so many multiprocessors.

    Chosen so that nothing spills: the three products that make up a float32 one hold each operand twice, and rows
    that are no multiple of 16 elements are loaded one by one.
    """
    narrow = dtype != torch.float32
    aligned = d % 16 == 0
    chunk = min(max(16, triton.next_power_of_2(d)), 256 if narrow else 128)
    most = (64 if narrow else 32) // (1 if aligned and d <= 128 else 2)
    queries = min(max(16, triton.next_power_of_2(n)), most)
    rows = (64 if most == 64 else 32) if aligned else 16
    steps = triton.cdiv(k, rows)
    wanted = max(1, processors * (2 if narrow else 1) // triton.cdiv(n, queries))
    rows_per_split = triton.cdiv(steps, wanted) * rows
    return Plan(
        queries=queries,
        rows=rows,
        chunk=chunk,
        chunks=triton.cdiv(d, chunk),
        splits=triton.cdiv(k, rows_per_split) if k else 1,
        rows_per_split=rows_per_split,
        prefetch=not narrow and not skipping,
        num_warps=4 if narrow and d <= (256 if aligned else 128) else 8,
        num_stages=3 if narrow and d <= chunk else 1,
    )


@triton.jit
def _load_chunk(pointer, row, n, d, c, CHUNK: tl.constexpr):
    """Columns from `c * CHUNK` on of rows of an (N, D) matrix, in float32."""
    column = c * CHUNK + tl.arange(0, CHUNK)
    inside = (row < n)[:, None] & (column < d)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_unit(pointer, row, n, d, DIM: tl.constexpr, NORMALIZED: tl.constexpr):
    """Rows of an (N, D) matrix in float32, of unit length, and their norms before (at least epsilon)."""
    x = _load_chunk(pointer, row, n, d, 0, DIM)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), NORM_EPSILON)
    if not NORMALIZED:
        x = x / norm[:, None]
    return x, norm


@triton.jit
def _through_norm(gradient, unit, norm):
    """The gradient to x of what has `gradient` at `unit = x / norm`, `norm = max(|x|, epsilon)`."""
    along = tl.where(norm > NORM_EPSILON, tl.sum(gradient * unit, axis=1), 0.0)
    return (gradient - unit * along[:, None]) / norm[:, None]


@triton.jit
def sweep(
    query, key, bank, skip, maxima, totals, weighted, ranks,
    n, k, d, skips, rows_per_split, factor, fixed_maximum,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    NORMALIZED: tl.constexpr, FIXED: tl.constexpr, SKIP: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """One split's part for one tile of queries, its weighted rows in one chunk of their columns.

    `factor` is log2(e) / t; maxima are in those units. Embeddings wider than a chunk have their logits computed
    once for each chunk: registers hold no more.
    """
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    split = tl.program_id(1)
    chunk = tl.program_id(2)
    column = tl.arange(0, CHUNK)

    squares = tl.zeros([QUERIES], tl.float32)
    key_squares = tl.zeros([QUERIES], tl.float32)
    similarity = tl.zeros([QUERIES], tl.float32)
    for c in tl.static_range(CHUNKS):
        q = _load_chunk(query, row, n, d, c, CHUNK)
        positive = _load_chunk(key, row, n, d, c, CHUNK)
        squares += tl.sum(q * q, axis=1)
        key_squares += tl.sum(positive * positive, axis=1)
        similarity += tl.sum(q * positive, axis=1)
    scale = tl.full([QUERIES], 1.0, tl.float32)
    if not NORMALIZED:
        scale = 1.0 / tl.maximum(tl.sqrt(squares), NORM_EPSILON)
        similarity = similarity * scale / tl.maximum(tl.sqrt(key_squares), NORM_EPSILON)
    q = (_load_chunk(query, row, n, d, 0, CHUNK) * scale[:, None]).to(bank.dtype.element_ty)

    maximum = tl.full([QUERIES], LOWEST, tl.float32)
    if FIXED:
        maximum = tl.full([QUERIES], 0.0, tl.float32) + fixed_maximum
    total = tl.zeros([QUERIES], tl.float32)
    mean = tl.zeros([QUERIES, CHUNK], tl.float32)
    rank = tl.zeros([QUERIES], tl.int32)
    start = split * rows_per_split
    # Addresses are a 64-bit scalar and 32-bit offsets inside a tile: half the registers.
    within = tl.arange(0, ROWS)
    offset = within[:, None] * d + column[None, :]
    following = tl.zeros([ROWS, CHUNK], bank.dtype.element_ty)
    if PREFETCH:
        inside = (start + within < k)[:, None] & (column < d)[None, :]
        following = tl.load(bank + tl.cast(start, tl.int64) * d + offset, mask=inside, other=0.0)
    for first in range(start, tl.minimum(start + rows_per_split, k), ROWS):
        j = first + within
        here = bank + tl.cast(first, tl.int64) * d
        if PREFETCH:
            tile = following
            inside = (j + ROWS < k)[:, None] & (column < d)[None, :]
            following = tl.load(here + ROWS * d + offset, mask=inside, other=0.0)
        else:
            tile = tl.load(here + offset, mask=(j < k)[:, None] & (column < d)[None, :], other=0.0)
        similarities = tl.dot(q, tile.T, input_precision="tf32x3")
        if CHUNKS > 1:
            for other in range(1, CHUNKS):
                q_other = (_load_chunk(query, row, n, d, other, CHUNK) * scale[:, None]).to(tile.dtype)
                inside = (j < k)[:, None] & (other * CHUNK + column < d)[None, :]
                tile = tl.load(here + other * CHUNK + offset, mask=inside, other=0.0)
                similarities = tl.dot(q_other, tile.T, similarities, input_precision="tf32x3")
            inside = (j < k)[:, None] & (chunk * CHUNK + column < d)[None, :]
            tile = tl.load(here + chunk * CHUNK + offset, mask=inside, other=0.0)
        similarities = tl.where((j < k)[None, :], similarities, float("-inf"))
        if SKIP:
            for m in range(skips):
                left_out = tl.load(skip + row.to(tl.int64) * skips + m, mask=row < n, other=-1)
                similarities = tl.where(left_out[:, None] == j[None, :], float("-inf"), similarities)
        rank += tl.sum((similarities > similarity[:, None]).to(tl.int32), axis=1)
        logits = similarities * factor
        if not FIXED:
            higher = tl.maximum(maximum, tl.max(logits, axis=1))
            shrink = tl.exp2(maximum - higher)
            maximum = higher
            total = total * shrink
            mean = mean * shrink[:, None]
        weights = tl.exp2(logits - maximum[:, None])
        total += tl.sum(weights, axis=1)
        mean = tl.dot(weights.to(tile.dtype), tile, mean, input_precision="tf32x3")

    part = split.to(tl.int64) * n + row
    tl.store(maxima + part, maximum, mask=(row < n) & (chunk == 0))
    tl.store(totals + part, total, mask=(row < n) & (chunk == 0))
    tl.store(ranks + part, rank, mask=(row < n) & (chunk == 0))
    column = chunk * CHUNK + column
    tl.store(weighted + part[:, None] * d + column[None, :], mean, mask=(row < n)[:, None] & (column < d)[None, :])


@triton.jit
def merge(
    query, key, maxima, totals, weighted, ranks, losses, rank_out, lse_out, dquery, dkey,
    n, d, splits, temperature, margin,
    DIM: tl.constexpr, SPLITS: tl.constexpr, NORMALIZED: tl.constexpr, KEY_GRADIENT: tl.constexpr,
):  # fmt: skip
    """One query's splits put together, SPLITS at a time, in order.

    With x the logarithm of the negatives' sum over the positive's term, the loss is log(1 + e^x), the negatives' share
    of the softmax 1 / (1 + e^-x), and the gradient share / (t N) * (the negatives' weighted mean - the key): nothing
    cancels, however small the loss.
    """
    i = tl.program_id(0)
    row = i + tl.arange(0, 1)
    column = tl.arange(0, DIM)
    q, q_norm = _load_unit(query, row, n, d, DIM, NORMALIZED)
    positive, k_norm = _load_unit(key, row, n, d, DIM, NORMALIZED)
    logit = (tl.sum(q * positive, axis=1) - margin) / temperature

    maximum = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    mean = tl.zeros([1, DIM], tl.float32)
    rank = tl.zeros([1], tl.int32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = split < splits
        part = split.to(tl.int64) * n + i
        split_maximum = tl.load(maxima + part, mask=inside, other=LOWEST)
        higher = tl.maximum(maximum, tl.max(split_maximum, axis=0))
        shrink = tl.exp2(maximum - higher)
        weight = tl.exp2(split_maximum - higher)
        rows = tl.load(
            weighted + part[:, None] * d + column[None, :],
            mask=inside[:, None] & (column < d)[None, :],
            other=0.0,
        )
        maximum = higher
        total = total * shrink + tl.sum(weight * tl.load(totals + part, mask=inside, other=0.0), axis=0)
        mean = mean * shrink[:, None] + tl.sum(weight[:, None] * rows, axis=0)[None, :]
        rank += tl.sum(tl.load(ranks + part, mask=inside, other=0), axis=0)

    x = (maximum + tl.log2(total)) * LN_2 - logit
    loss = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
    share = 1.0 / (1.0 + tl.exp(-x))
    mean = mean / tl.where(total > 0, total, 1.0)[:, None]
    step = (share / (temperature * n))[:, None]
    tl.store(losses + row, loss)
    tl.store(rank_out + row, rank.to(tl.int64))
    tl.store(lse_out + row, logit + loss)

    out = row.to(tl.int64)[:, None] * d + column[None, :]
    gradient = step * (mean - positive)
    if not NORMALIZED:
        gradient = _through_norm(gradient, q, q_norm)
    tl.store(dquery + out, gradient, mask=(column < d)[None, :])
    if KEY_GRADIENT:
        gradient = -step * q
        if not NORMALIZED:
            gradient = _through_norm(gradient, positive, k_norm)
        tl.store(dkey + out, gradient, mask=(column < d)[None, :])


@on_its_device
def infonce(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    skip: Tensor | None,
    temperature: float,
    margin: float,
    normalized: bool,
    fixed_maximum: bool,
    key_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (), rank (N,) int64, lse (N,), dquery (N, D), dkey (N, D) or (0, D), as
    `fastmoco.ops.infonce_reference.reference`.

    `query` and `key` of any floating dtype up to float32, any D. A float32 bank is multiplied in three
    TF32 products, to float32's accuracy; for a bfloat16 or float16 bank the queries and the weights are rounded to its
    dtype, and sums are float32. Deterministic.
    """
    (n, d), (k, _) = query.shape, bank.shape
    assert query.dtype != torch.float64
    query, key = query.contiguous(), key.contiguous()
    bank = (bank.float() if bank.dtype == torch.float64 else bank).contiguous()
    tiles = plan(n, k, d, bank.dtype, skip is not None, processors(query.device))

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    maxima, totals, weighted = new(tiles.splits, n), new(tiles.splits, n), new(tiles.splits, n, d)
    ranks = new(tiles.splits, n, dtype=torch.int32)
    sweep[(triton.cdiv(n, tiles.queries), tiles.splits, tiles.chunks)](
        query, key, bank, None if skip is None else skip.contiguous(), maxima, totals, weighted, ranks,
        n, k, d, 0 if skip is None else skip.shape[1], tiles.rows_per_split,
        LOG2_E.value / temperature, LOG2_E.value / temperature,
        QUERIES=tiles.queries, ROWS=tiles.rows, CHUNK=tiles.chunk, CHUNKS=tiles.chunks, NORMALIZED=normalized,
        # float16 weights would underflow below a maximum that no logit attains.
        FIXED=fixed_maximum and bank.dtype != torch.float16, SKIP=skip is not None, PREFETCH=tiles.prefetch,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip

    losses, lse, rank, dquery = new(n), new(n), new(n, dtype=torch.int64), new(n, d)
    dkey = new(n if key_gradient else 0, d)
    merge[(n,)](
        query, key, maxima, totals, weighted, ranks, losses, rank, lse, dquery, dkey,
        n, d, tiles.splits, temperature, margin,
        DIM=triton.next_power_of_2(d), SPLITS=16, NORMALIZED=normalized, KEY_GRADIENT=key_gradient, num_warps=4,
    )  # fmt: skip
    return losses.mean(), rank, lse, dquery, dkey
