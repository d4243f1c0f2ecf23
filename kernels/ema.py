"""The moving average of weights over a whole list of tensors in one launch, with bfloat16 copies of the result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoco.kernels.device import on_its_device
from fastmoco.kernels.table import BLOCK, NUM_WARPS, locate, pointer, table

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def lerp(k, q, weight):
    """torch's lerp: each branch is exact at its own end of [0, 1]."""
    return tl.where(weight < 0.5, k + weight * (q - k), q - (q - k) * (1.0 - weight))


@triton.jit
def _block(row, start, left, weight, SOURCE, SHADOWS, ALIGNED, BLOCK: tl.constexpr):
    element = tl.arange(0, BLOCK)
    inside = element < left
    target = pointer(row, 0, start, tl.float32, ALIGNED) + element
    source = pointer(row, 1, start, SOURCE, ALIGNED) + element
    k = lerp(tl.load(target, mask=inside), tl.load(source, mask=inside).to(tl.float32), weight)
    tl.store(target, k, mask=inside)
    if SHADOWS:
        tl.store(pointer(row, 2, start, tl.bfloat16, ALIGNED) + element, k.to(tl.bfloat16), mask=inside)


@triton.jit
def ema(
    memory, tensors, weight,
    SOURCE: tl.constexpr, SHADOWS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one tensor; the table's columns are target, source, where there are shadows shadow, and size."""
    row, start, left = locate(memory, tensors, 4 if SHADOWS else 3, BLOCK)
    # A mask that the compiler sees through leaves accesses of 16 bytes whole.
    if left >= BLOCK:
        _block(row, start, BLOCK, weight, SOURCE, SHADOWS, ALIGNED, BLOCK)
    else:
        _block(row, start, left, weight, SOURCE, SHADOWS, ALIGNED, BLOCK)


def ema_update(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], momentum: float) -> None:
    """targets[i] <- momentum * targets[i] + (1 - momentum) * sources[i], and shadows[i] the same in bfloat16.

    `targets` are float32; `sources` have one dtype of ELEMENTS; `shadows` are as many, or none. All without gaps and
    each row in one order in memory. By the formula of csrc/ema.h, without fused multiply-adds: the same bits.
    """
    found = table([targets, sources, *([shadows] if shadows else ())])
    if found.blocks:
        _launch(
            found.memory, found.tensors, 1.0 - momentum, sources[0].dtype, bool(shadows), found.aligned, found.blocks
        )


@on_its_device
def _launch(
    memory: Tensor, tensors: int, weight: float, dtype: torch.dtype, shadows: bool, aligned: bool, blocks: int
) -> None:
    ema[(blocks,)](
        memory, tensors, weight,
        SOURCE=ELEMENTS[dtype], SHADOWS=shadows, ALIGNED=aligned, BLOCK=BLOCK,
        num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
