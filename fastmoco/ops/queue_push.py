"""Appending keys to a ring of rows, the place of the next one being known to the device alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco.errors import UserError
from fastmoco.ops import dispatch
from fastmoco.ops.lists import check_apart, define_inplace


@torch.no_grad()
def queue_push_(bank: Tensor, pointer: Tensor, keys: Tensor, *, implementation: str | None = None) -> None:
    """bank[(pointer + i) % K] <- keys[i] for each of the N keys, in order; pointer <- (pointer + N) % K; in place.

    Of more keys than rows the last K stay. Nothing is read back to the host and no shape depends on the pointer, so
    this can be captured in a CUDA graph. Always deterministic.

    bank: (K, D), of any floating-point dtype, which the keys are rounded to.
    pointer: 0-d int64 on the bank's device, from 0 to K - 1.
    keys: (N, D), floating-point, on the same device; N may be 0.
    implementation: "reference" or "triton"; None has it chosen.

    Raises UserError (a ValueError), before anything is written, where shapes, dtypes or devices do not fit, the bank
    requires a gradient or has no rows, or keys and bank share memory.
    """
    if bank.ndim != 2 or keys.ndim != 2 or bank.shape[1] != keys.shape[1]:
        raise UserError(
            f"queue_push_: bank must be (K, D) and keys (N, D), not {tuple(bank.shape)} and {tuple(keys.shape)}"
        )
    if bank.shape[0] == 0:
        raise UserError("queue_push_: the bank has no rows")
    if not (bank.is_floating_point() and keys.is_floating_point()):
        raise UserError(f"queue_push_: bank and keys must be floating-point, not {bank.dtype} and {keys.dtype}")
    if bank.requires_grad:
        raise UserError("queue_push_: the bank requires a gradient; call requires_grad_(False) on it")
    if pointer.ndim != 0 or pointer.dtype != torch.int64:
        raise UserError(f"queue_push_: pointer must be 0-d int64, not {pointer.dtype} of shape {tuple(pointer.shape)}")
    if not bank.device == pointer.device == keys.device:
        raise UserError(
            f"queue_push_: bank, pointer and keys must be on one device, not {bank.device}, {pointer.device} and "
            f"{keys.device}"
        )
    _queue_push_(bank, pointer, keys, implementation)


def _push(bank: Tensor, pointer: Tensor, keys: Tensor, implementation: str | None) -> None:
    check_apart("queue_push_", {"bank": [bank]}, {"keys": [keys]})
    dispatch.pick("queue_push", bank, implementation)(bank, pointer, keys)
    # An implementation may write behind autograd's back: a graph that saved the bank must find out.
    torch.autograd.graph.increment_version([bank, pointer])


_queue_push_ = define_inplace(
    "queue_push_(Tensor(a!) bank, Tensor(b!) pointer, Tensor keys, str? implementation) -> ()", _push
)


def reference(bank: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Any device and dtype; moves the pointer too."""
    size, count = bank.shape[0], keys.shape[0]
    first = max(0, count - size)
    rows = (pointer + torch.arange(first, count, device=bank.device)) % size
    bank.index_copy_(0, rows, keys[first:].to(bank.dtype))
    pointer.add_(count).remainder_(size)


dispatch.register("queue_push", "reference", reference)


def _triton(bank: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Triton where the bank has no gaps and neither side is float64, the reference elsewhere."""
    if not bank.is_contiguous() or keys.dtype == torch.float64:
        reference(bank, pointer, keys)
        return
    from fastmoco.kernels.queue_push import queue_push

    queue_push(bank, pointer, keys)


dispatch.register(
    "queue_push",
    "triton",
    _triton,
    device_types=("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    missing=dispatch.TRITON_MISSING,
)
