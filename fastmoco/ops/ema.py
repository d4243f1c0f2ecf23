"""Exponential moving average of weights, in place over a whole list of tensors."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastmoco.errors import UserError
from fastmoco.ops import dispatch

_NATIVE_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


@torch.no_grad()
def ema_update_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float,
    *,
    implementation: str | None = None,
) -> None:
    """targets[i] <- momentum * targets[i] + (1 - momentum) * sources[i], in place.

    Computed as torch.lerp does, in the dtype of the target: the result is within rounding of the exact one,
    and momentum 1 and 0 keep the target and copy the source to the last bit. Keep targets in float32 or
    wider: at a momentum of 0.999 bfloat16 weights never move, since each step is below half their spacing.

    targets: floating-point tensors of any shapes and strides on one device, none requiring a gradient.
    sources: as many, of the same shapes on the same device; another dtype is converted to the target's.
    implementation: "reference" or "native"; None has it chosen.

    Raises UserError (a ValueError), before anything is written, where lengths, shapes or devices differ,
    a dtype is not floating-point, a target requires a gradient, shares memory with another tensor or is
    expanded, or momentum lies outside [0, 1].
    """
    if not 0.0 <= momentum <= 1.0:
        raise UserError(f"ema_update_: momentum must lie in [0, 1], not {momentum}")
    if len(targets) != len(sources):
        raise UserError(f"ema_update_: {len(targets)} targets but {len(sources)} sources")
    if not targets:
        return
    _check(targets, sources)
    dispatch.pick("ema", targets[0], implementation)(targets, sources, momentum)


def _check(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    device = targets[0].device
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        wrong = ""
        if target.shape != source.shape:
            wrong = f"shapes differ, {tuple(target.shape)} and {tuple(source.shape)}"
        elif target.device != device or source.device != device:
            wrong = f"all tensors must be on {device}, not {target.device} and {source.device}"
        elif not (target.is_floating_point() and source.is_floating_point()):
            wrong = f"only floating-point tensors have an average, not {target.dtype} and {source.dtype}"
        elif target.requires_grad:
            wrong = "the target requires a gradient; call requires_grad_(False) on the averaged weights"
        elif 0 in target.stride() and not target.is_contiguous():
            wrong = "the target is expanded: several of its elements are one in memory"
        if wrong:
            raise UserError(f"ema_update_: tensor {i} of {len(targets)}: {wrong}")
    _check_apart(targets, sources)


def _check_apart(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Refuses targets that share memory with each other, with a source, or within themselves.

    Sources may share among themselves. Tensors with gaps in memory are compared with no other: they may
    interleave without sharing an element.
    """
    written = [_span(target) for target in targets]
    read = [_span(source) for source in sources]
    in_order = sorted([*written, *set(read)])
    if all(end <= start for (_, end), (start, _) in pairwise(in_order)):
        return
    for i, (start, end) in enumerate(written):
        for name, spans in (("target", written[:i]), ("source", read)):
            for j, (other_start, other_end) in enumerate(spans):
                if start < other_end and other_start < end:
                    raise UserError(f"ema_update_: target {i} and {name} {j} share memory")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and one past the last address of a tensor without gaps; (0, 0) of others."""
    if tensor.is_contiguous() or _is_channels_last(tensor):
        start = tensor.data_ptr()
        return start, start + tensor.nbytes
    return 0, 0


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _reference(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    converted = [source.to(target.dtype) for target, source in zip(targets, sources, strict=True)]
    torch._foreach_lerp_(list(targets), converted, 1.0 - momentum)


def _native(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    assert dispatch.native is not None
    flat: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {dtype: [] for dtype in _NATIVE_DTYPES}
    rest: list[tuple[Tensor, Tensor]] = []
    for target, source in zip(targets, sources, strict=True):
        same_order = (target.is_contiguous() and source.is_contiguous()) or (
            _is_channels_last(target) and _is_channels_last(source)
        )
        suits = same_order and target.dtype == source.dtype and target.dtype in flat
        (flat[target.dtype] if suits else rest).append((target, source))
    for dtype, pairs in flat.items():
        if pairs:
            dispatch.native.ema_update(
                [target.data_ptr() for target, _ in pairs],
                [source.data_ptr() for _, source in pairs],
                [target.numel() for target, _ in pairs],
                momentum=momentum,
                dtype=_NATIVE_DTYPES[dtype],
                threads=torch.get_num_threads(),
            )
            # Written behind autograd's back: a graph that saved a target must find out, as after any in-place
            # op.
            torch.autograd.graph.increment_version([target for target, _ in pairs])
    if rest:
        _reference([target for target, _ in rest], [source for _, source in rest], momentum)


dispatch.register("ema", "reference", _reference)
dispatch.register("ema", "native", _native, device_types=("cpu",), missing=dispatch.NATIVE_MISSING)
