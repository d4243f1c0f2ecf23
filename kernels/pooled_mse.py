"""Mean squared error of adaptively pooled channels-last maps: both maps read once, the gradient written once.

Cell i of G covers pixels floor(i H / G) to ceil((i + 1) H / G) of H, and pixel y is covered by cells floor(y G / H) to
ceil((y + 1) G / H), whether cells overlap, part the side or repeat.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoco.kernels.device import on_its_device, processors

# Elements of a program's tile: two loads of 16 bytes of bfloat16 in flight for each of 128 threads, or eight where a
# program goes through a large region and there are few programs.
TILE, LARGE_TILE = 2048, 8192


@dataclass(frozen=True, slots=True)
class Plan:
    """A program's tile: `pixels` x `channels`."""

    pixels: int
    channels: int
    num_warps: int = 4


def plan(pixels: int, channels: int, tiles: int, processors: int) -> Plan:
    """The tile for regions of so many pixels, `tiles` of them; thinner where there are too few to fill the device."""
    wide = min(triton.next_power_of_2(channels), 512)
    while wide > 64 and tiles * triton.cdiv(channels, wide) < 4 * processors:
        wide //= 2
    elements = LARGE_TILE if pixels * wide >= 4 * LARGE_TILE else TILE
    return Plan(pixels=min(triton.next_power_of_2(pixels), max(1, elements // wide)), channels=wide)


@triton.jit
def forward(
    a, b, difference, partial,
    channels, height, width, grid,
    POOLED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One cell's difference of means in one block of channels, and the sum of its squares; b is pooled, or a map."""
    cell = tl.program_id(0)
    column = cell % grid
    row = cell // grid % grid
    image = (cell // grid // grid).to(tl.int64)
    top, left = row * height // grid, column * width // grid
    across = ((column + 1) * width + grid - 1) // grid - left
    pixels = (((row + 1) * height + grid - 1) // grid - top) * across

    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start = ((image * height + top) * width + left) * channels
    total = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, pixels, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        offset = (pixel // across * width + pixel % across)[:, None] * channels + channel[None, :]
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        tile = tl.load(a + start + offset, mask=inside, other=0.0).to(tl.float32)
        if not POOLED:
            tile -= tl.load(b + start + offset, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tile, axis=0)
    mean = total / pixels
    out = cell.to(tl.int64) * channels + channel
    if POOLED:
        mean -= tl.load(b + out, mask=channel < channels, other=0.0).to(tl.float32)
    tl.store(difference + out, mean, mask=channel < channels)
    tl.store(partial + cell * tl.num_programs(1) + tl.program_id(1), tl.sum(mean * mean, axis=0))


@triton.jit
def backward(
    difference, dloss, da,
    channels, height, width, grid, rows_most, columns_most, factor,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient at PIXELS pixels of one image: over the cells that cover each, the cell's share."""
    blocks = tl.cdiv(height * width, PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (pixel < height * width)[:, None] & (channel < channels)[None, :]
    y, x = pixel // width, pixel % width
    first_row, first_column = y * grid // height, x * grid // width
    last_row = ((y + 1) * grid + height - 1) // height - 1
    last_column = ((x + 1) * grid + width - 1) // width - 1

    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for down in range(rows_most):
        row = first_row + down
        tall = ((row + 1) * height + grid - 1) // grid - row * height // grid
        for right in range(columns_most):
            column = first_column + right
            wide = ((column + 1) * width + grid - 1) // grid - column * width // grid
            covers = (row <= last_row) & (column <= last_column)
            share = 1.0 / (tall * wide).to(tl.float32)
            offset = (row * grid + column)[:, None] * channels + channel[None, :]
            cell = tl.load(
                difference + image * grid * grid * channels + offset, mask=inside & covers[:, None], other=0.0
            )
            total += cell * share[:, None]
    total *= factor * tl.load(dloss)
    offset = pixel[:, None] * channels + channel[None, :]
    tl.store(da + image * height * width * channels + offset, total.to(da.dtype.element_ty), mask=inside)


@on_its_device
def pooled_mse(a: Tensor, b: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """The loss () and pool(a) - pool(b), (N, grid, grid, C), in float32.

    `a` is (N, C, H, W) of any dtype up to float32, `b` like it or pooled already, (N, C, grid, grid); both are copied
    where they are not channels-last. Deterministic: each program's sum of squares is kept and added in order.
    """
    n, c, height, width = a.shape
    pooled = b.shape != a.shape
    a, b = (x.contiguous(memory_format=torch.channels_last) for x in (a, b))
    cells = n * grid * grid
    window = (triton.cdiv(height, grid) + 1) * (triton.cdiv(width, grid) + 1)
    if height % grid == 0 and width % grid == 0:
        window = height // grid * (width // grid)
    tile = plan(window, c, cells, processors(a.device))
    blocks = triton.cdiv(c, tile.channels)
    difference = torch.empty((n, grid, grid, c), dtype=torch.float32, device=a.device)
    partial = torch.empty((cells, blocks), dtype=torch.float32, device=a.device)
    forward[(cells, blocks)](
        a, b, difference, partial, c, height, width, grid,
        POOLED=pooled, PIXELS=tile.pixels, CHANNELS=tile.channels, num_warps=tile.num_warps,
    )  # fmt: skip
    return partial.sum() / difference.numel(), difference


@on_its_device
def pooled_mse_backward(difference: Tensor, dloss: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """The gradient to the first map, (N, C, height, width) channels-last of `dtype`, written once.

    `difference` as `pooled_mse` returned it, `dloss` 0-d on its device. Deterministic: each pixel gathers its cells.
    """
    n, grid, _, c = difference.shape
    difference = difference.contiguous()
    # A program has one tile of pixels and no region to go through.
    most = TILE // min(triton.next_power_of_2(c), 64)
    tile = plan(min(height * width, most), c, n * triton.cdiv(height * width, most), processors(difference.device))
    da = torch.empty((n, height, width, c), dtype=dtype, device=difference.device)
    backward[(n * triton.cdiv(height * width, tile.pixels), triton.cdiv(c, tile.channels))](
        difference, dloss, da, c, height, width, grid,
        _most_cells(height, grid), _most_cells(width, grid), 2 / difference.numel(),
        PIXELS=tile.pixels, CHANNELS=tile.channels, num_warps=tile.num_warps,
    )  # fmt: skip
    return da.permute(0, 3, 1, 2)


def _most_cells(side: int, grid: int) -> int:
    """The most cells that cover one pixel."""
    return max(triton.cdiv((y + 1) * grid, side) - y * grid // side for y in range(side))
