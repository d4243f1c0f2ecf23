"""A step of SGD and the moving average of the weights it gives, over a whole list of tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastmoco.kernels.device import on_its_device
from fastmoco.kernels.ema import ELEMENTS, lerp
from fastmoco.kernels.table import BLOCK, NUM_WARPS, locate, pointer, table


@triton.jit
def _block(
    row, start, left, found_inf, lr, momentum, weight_decay, weight,
    GRADIENT, BUFFERS, SHADOWS, BLOCKABLE, ALIGNED, BLOCK: tl.constexpr,
):  # fmt: skip
    # Masks in place of branches: what they leave out is not moved, and inside a branch accesses would be of 4 bytes.
    element = tl.arange(0, BLOCK)
    inside = element < left
    moves = inside
    if BLOCKABLE:
        moves = inside & (tl.load(found_inf + tl.arange(0, 1)) != 1.0)
    parameter = pointer(row, 0, start, tl.float32, ALIGNED) + element
    p = tl.load(parameter, mask=inside)
    g = tl.load(pointer(row, 1, start, GRADIENT, ALIGNED) + element, mask=moves).to(tl.float32)
    g = g + weight_decay * p
    if BUFFERS:
        buffer = pointer(row, 2, start, tl.float32, ALIGNED) + element
        g = momentum * tl.load(buffer, mask=moves) + g
        tl.store(buffer, g, mask=moves)
    p = tl.where(moves, p - lr * g, p)
    tl.store(parameter, p, mask=moves)

    followed = inside & (tl.load(row + 3) != 0)
    target = pointer(row, 3, start, tl.float32, ALIGNED) + element
    k = lerp(tl.load(target, mask=followed), p, weight)
    tl.store(target, k, mask=followed)
    if SHADOWS:
        tl.store(pointer(row, 4, start, tl.bfloat16, ALIGNED) + element, k.to(tl.bfloat16), mask=followed)


@triton.jit
def sgd_ema(
    memory, found_inf, tensors, lr, momentum, weight_decay, weight,
    GRADIENT: tl.constexpr, BUFFERS: tl.constexpr, SHADOWS: tl.constexpr, BLOCKABLE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one tensor; the table's columns are parameter, gradient, buffer, target, shadow and size."""
    row, start, left = locate(memory, tensors, 6, BLOCK)
    # A mask that the compiler sees through leaves accesses of 16 bytes whole.
    if left >= BLOCK:
        _block(
            row, start, BLOCK, found_inf, lr, momentum, weight_decay, weight,
            GRADIENT, BUFFERS, SHADOWS, BLOCKABLE, ALIGNED, BLOCK,
        )  # fmt: skip
    else:
        _block(
            row, start, left, found_inf, lr, momentum, weight_decay, weight,
            GRADIENT, BUFFERS, SHADOWS, BLOCKABLE, ALIGNED, BLOCK,
        )  # fmt: skip


def sgd_ema_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor | None],
    targets: Sequence[Tensor | None],
    shadows: Sequence[Tensor | None],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    ema: float,
    found_inf: Tensor | None,
) -> None:
    """g += weight_decay * p;  b <- momentum * b + g;  p -= lr * b;  k <- ema * k + (1 - ema) * p, and k in bfloat16.

    `parameters`, `buffers` (or all None) and `targets` (None for a parameter without) are float32; `gradients` have
    one dtype of ELEMENTS; `shadows` are bfloat16, for every target or all None. All without gaps and each row in one
    order in memory. `found_inf` 0-d float32: where it holds 1, parameters and buffers stay and averages move on. By
    the formulas of csrc/sgd_ema.h, without fused multiply-adds: the same bits.
    """
    found = table([parameters, gradients, buffers, targets, shadows])
    if not found.blocks:
        return
    _launch(
        found.memory, found_inf, found.tensors, (lr, momentum, weight_decay, 1.0 - ema), found.blocks,
        GRADIENT=ELEMENTS[gradients[0].dtype],
        BUFFERS=buffers[0] is not None,
        SHADOWS=any(shadow is not None for shadow in shadows),
        ALIGNED=found.aligned,
    )  # fmt: skip


@on_its_device
def _launch(
    memory: Tensor, found_inf: Tensor | None, tensors: int, numbers: tuple[float, ...], blocks: int, **options: object
) -> None:
    sgd_ema[(blocks,)](
        memory, found_inf, tensors, *numbers,
        **options, BLOCKABLE=found_inf is not None, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
