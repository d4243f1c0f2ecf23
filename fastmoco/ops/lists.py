"""What the in-place operations on lists of tensors share: registration, checks, and C++ on addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import le
from typing import Any

import torch
from torch import Tensor

from fastmoco.errors import UserError
from fastmoco.ops import dispatch
from fastmoco.ops.library import define

# By the names that fastmoco._C has for the dtypes it computes in.
NATIVE_DTYPES = {torch.float32: "float32", torch.float64: "float64"}

NATIVE_DEVICES = ("cpu", "cuda") if dispatch.native and dispatch.native.build_info()["cuda"] else ("cpu",)


def define_inplace(schema: str, function: Callable[..., None]) -> Any:
    """Registers `function`, which writes to its arguments alone, as `define` does."""
    return define(schema, function, lambda *_, **__: None)


def check_alike(operation: str, name: str, tensors: Sequence[Tensor], other: str, others: Sequence[Tensor]) -> None:
    """Refuses lists whose tensors are not, one by one, floating-point, of one shape and all on one device."""
    if len(tensors) != len(others):
        raise UserError(f"{operation}: {len(tensors)} {name}s but {len(others)} {other}s")
    if not tensors:
        return
    device = tensors[0].device
    for i, (a, b) in enumerate(zip(tensors, others, strict=True)):
        if a.shape != b.shape:
            wrong = f"shapes differ, {tuple(a.shape)} and {tuple(b.shape)}"
        elif a.device != device or b.device != device:
            wrong = f"all tensors must be on {device}, not {a.device} and {b.device}"
        elif not (a.is_floating_point() and b.is_floating_point()):
            wrong = f"only floating-point tensors have an average, not {a.dtype} and {b.dtype}"
        else:
            continue
        raise UserError(f"{operation}: {name} {i} and {other} {i} of {len(tensors)}: {wrong}")


def check_targets(operation: str, targets: Sequence[Tensor]) -> None:
    """Refuses averages that require a gradient."""
    for i, target in enumerate(targets):
        if target.requires_grad:
            raise UserError(
                f"{operation}: target {i} of {len(targets)} requires a gradient; call requires_grad_(False) on the "
                "averaged weights"
            )


def check_shadows(
    operation: str, targets: Sequence[Tensor], shadows: Sequence[Tensor], name: str = "target", shadow: str = "shadow"
) -> None:
    """Refuses shadows that are not bfloat16 tensors of the targets' shapes, on their device."""
    check_alike(operation, name, targets, shadow, shadows)
    for i, tensor in enumerate(shadows):
        if tensor.dtype != torch.bfloat16:
            raise UserError(f"{operation}: {shadow} {i} of {len(shadows)} must be bfloat16, not {tensor.dtype}")


def check_apart(
    operation: str, written: Mapping[str, Sequence[Tensor]], read: Mapping[str, Sequence[Tensor]]
) -> None:
    """Refuses tensors to write that share memory with another to write or to read, or within themselves.

    Lists by the name of one of their tensors. Those to read may share among themselves. Tensors with gaps in memory
    are compared with no other: they may interleave without sharing an element.
    """
    spans = {name: _spans(list_) for name, list_ in written.items()}
    for name, list_ in spans.items():
        for i, span in enumerate(list_):
            if span is _GAPS and 0 in written[name][i].stride():
                raise UserError(f"{operation}: {name} {i} is expanded: several of its elements are one in memory")
    seen = {name: _spans(list_) for name, list_ in read.items()}
    every = [*chain(*spans.values()), *set(chain(*seen.values()))]
    # No address lies within two spans if, in order, each ends before the next starts: the usual case, found quickly.
    starts, ends = sorted([start for start, _ in every]), sorted([end for _, end in every])
    if all(map(le, ends, starts[1:])):
        return
    compared: dict[str, list[tuple[int, int]]] = {}
    for name, list_ in spans.items():
        for i, (start, end) in enumerate(list_):
            for other, others in (compared | {name: list_[:i]} | seen).items():
                for j, (other_start, other_end) in enumerate(others):
                    if start < other_end and other_start < end:
                        raise UserError(f"{operation}: {name} {i} and {other} {j} share memory")
        compared[name] = list_


_GAPS = (0, 0)


def _spans(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """First and one past the last address of each tensor without gaps; `_GAPS` for others."""
    spans = []
    for tensor in tensors:
        if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
            start = tensor.data_ptr()
            # Half the time of tensor.nbytes.
            spans.append((start, start + tensor.numel() * tensor.element_size()))
        else:
            spans.append(_GAPS)
    return spans


def same_order(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape have no gaps and the same order in memory, so that they can be taken as flat."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            return all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
    return True


def call_native(name: str, tensor: Tensor, *addresses: list[int], **options: Any) -> None:
    """Runs fastmoco._C's function `name` in `tensor`'s dtype and on its device: torch's threads, or current stream."""
    assert dispatch.native is not None
    options["dtype"] = NATIVE_DTYPES[tensor.dtype]
    if tensor.device.type == "cpu":
        getattr(dispatch.native, name)(*addresses, **options, threads=torch.get_num_threads())
        return
    device = tensor.get_device()
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        getattr(dispatch.native, f"{name}_cuda")(*addresses, **options, device=device, stream=stream)
