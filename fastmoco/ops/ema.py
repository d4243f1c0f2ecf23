"""Exponential moving average of weights, in place over a whole list of tensors: k <- m k + (1 - m) q."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmoco.errors import UserError
from fastmoco.ops import dispatch
from fastmoco.ops.lists import (
    NATIVE_DEVICES,
    NATIVE_DTYPES,
    call_native,
    check_alike,
    check_apart,
    check_shadows,
    check_targets,
    define_inplace,
    same_order,
)


@torch.no_grad()
def ema_update_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float,
    *,
    shadows: Sequence[Tensor] | None = None,
    implementation: str | None = None,
) -> None:
    """targets[i] <- momentum * targets[i] + (1 - momentum) * sources[i], in place.

    Computed as torch.lerp does, in the dtype of the target: the result is within rounding of the exact one,
    and momentum 1 and 0 keep the target and copy the source to the last bit. Keep targets in float32 or
    wider: at a momentum of 0.999 bfloat16 weights never move, since each step is below half their spacing.
    Always deterministic: each element is computed from its own operands alone.

    targets: floating-point tensors of any shapes and strides on one device, none requiring a gradient.
    sources: as many, of the same shapes on the same device; another dtype is converted to the target's.
    shadows: as many bfloat16 tensors of the same shapes, which take the new targets, rounded to the nearest.
    implementation: "reference", "native" or "triton"; None has it chosen.

    Raises UserError (a ValueError), before anything is written, where lengths, shapes or devices differ,
    a dtype is not floating-point, a shadow is not bfloat16, a target requires a gradient, a tensor to be written
    shares memory with another or is expanded, or momentum lies outside [0, 1].
    """
    if not 0.0 <= momentum <= 1.0:
        raise UserError(f"ema_update_: momentum must lie in [0, 1], not {momentum}")
    check_alike("ema_update_", "target", targets, "source", sources)
    check_targets("ema_update_", targets)
    if shadows is not None:
        check_shadows("ema_update_", targets, shadows)
    if targets:
        _ema_update_(list(targets), list(sources), list(shadows or ()), momentum, implementation)


def _update(
    targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], momentum: float, implementation: str | None
) -> None:
    check_apart("ema_update_", {"target": targets, "shadow": shadows}, {"source": sources})
    dispatch.pick("ema", targets[0], implementation)(targets, sources, shadows, momentum)
    # Written behind autograd's back: a graph that saved a target must find out, as after any in-place operation.
    torch.autograd.graph.increment_version([*targets, *shadows])


_ema_update_ = define_inplace(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!)[] shadows, float momentum, str? implementation)"
    " -> ()",
    _update,
)


def reference(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], momentum: float) -> None:
    """Any device, dtype and layout; `shadows` holds as many tensors as `targets`, or none."""
    converted = [source.to(target.dtype) for target, source in zip(targets, sources, strict=True)]
    torch._foreach_lerp_(targets, converted, 1.0 - momentum)
    if shadows:
        torch._foreach_copy_(shadows, targets)


def _native(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], momentum: float) -> None:
    """C++ for the tensors without gaps of the dtypes it knows, the reference for the rest."""

    def known(target: Tensor, source: Tensor) -> torch.dtype | None:
        return target.dtype if target.dtype in NATIVE_DTYPES and target.dtype == source.dtype else None

    for dtype, lists in _groups(targets, sources, shadows, known).items():
        if dtype is None:
            reference(*lists, momentum)
            continue
        addresses = [[tensor.data_ptr() for tensor in list_] for list_ in lists]
        sizes = [tensor.numel() for tensor in lists[0]]
        call_native("ema_update", lists[0][0], *addresses, sizes, momentum=momentum)


def _triton(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], momentum: float) -> None:
    """Triton for float32 tensors without gaps, one launch for each dtype of sources; the reference for the rest."""
    from fastmoco.kernels.ema import ELEMENTS, ema_update

    def known(target: Tensor, source: Tensor) -> torch.dtype | None:
        return source.dtype if target.dtype == torch.float32 and source.dtype in ELEMENTS else None

    for dtype, lists in _groups(targets, sources, shadows, known).items():
        (reference if dtype is None else ema_update)(*lists, momentum)


def _groups(
    targets: list[Tensor],
    sources: list[Tensor],
    shadows: list[Tensor],
    known: Callable[[Tensor, Tensor], torch.dtype | None],
) -> dict[torch.dtype | None, tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """The three lists by what is `known` of their rows; those whose tensors cannot be taken as flat under None."""
    groups: dict[torch.dtype | None, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
    for row in zip(targets, sources, *((shadows,) if shadows else ()), strict=True):
        kind = known(row[0], row[1]) if same_order(row) else None
        for list_, tensor in zip(groups.setdefault(kind, ([], [], [])), row, strict=False):
            list_.append(tensor)
    return groups


dispatch.register("ema", "reference", reference)
# Before Triton on a GPU: its launch takes the list by value, with no table of addresses to keep on the device.
dispatch.register(
    "ema", "native", _native, device_types=NATIVE_DEVICES, missing=dispatch.NATIVE_MISSING, preferred=True
)
dispatch.register("ema", "triton", _triton, device_types=("cuda",), missing=dispatch.TRITON_MISSING)
