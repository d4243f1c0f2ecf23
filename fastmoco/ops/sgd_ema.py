"""A step of SGD and the moving average of the weights it gives, in place and in one pass over memory.

    g += weight_decay * p;   b <- momentum * b + g;   p -= lr * b;   k <- ema * k + (1 - ema) * p

The formula and order of torch.optim.SGD (without dampening and Nesterov's momentum), then that of ops/ema.py. One
after the other they move 20 + 12 bytes a float32 parameter, together 28.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmoco.errors import UserError
from fastmoco.ops import dispatch
from fastmoco.ops.ema import reference as ema_reference
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

_NAME = "sgd_ema_update_"


@torch.no_grad()
def sgd_ema_update_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    ema: float,
    found_inf: Tensor | None = None,
    shadows: Sequence[Tensor | None] | None = None,
    copies: Sequence[Tensor | None] | None = None,
    implementation: str | None = None,
) -> None:
    """One step of SGD on `parameters` and the update of their averages `targets`, all in place.

    Within rounding of torch.optim.SGD's step followed by `ema_update_`, in the dtype of the parameter. Always
    deterministic: each element is computed from its own operands alone.

    parameters: floating-point tensors of any shapes and strides on one device; they may require gradients.
    gradients: as many, of the same shapes; another dtype is converted to the parameter's.
    buffers: SGD's momentum, as many, of the same shapes and dtypes, zeros before the first step; none where momentum
        is 0.
    targets: the average of each parameter, of its shape and dtype, or None for a parameter that has none.
    lr, momentum, weight_decay, ema: as above.
    found_inf: 0-d float32 tensor on the same device; where it holds 1, parameters and buffers stay as they are and
        the averages move on all the same. It is not read by the host, other than for tensors in the host's memory.
    shadows: as many bfloat16 tensors, which take the new targets rounded to the nearest; None where a target is.
    implementation: "reference", "native" or "triton"; None has it chosen.

    Raises UserError (a ValueError), before anything is written, where lengths, shapes, dtypes or devices do not
    fit, a target requires a gradient, a tensor to be written shares memory with another or is expanded, ema lies
    outside [0, 1], or another number is negative or not finite.
    """
    for name, number in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        if not 0.0 <= number < math.inf:
            raise UserError(f"{_NAME}: {name} must be 0 or more, not {number}")
    if not 0.0 <= ema <= 1.0:
        raise UserError(f"{_NAME}: ema must lie in [0, 1], not {ema}")
    check_alike(_NAME, "parameter", parameters, "gradient", gradients)
    if buffers or momentum:
        check_alike(_NAME, "parameter", parameters, "buffer", buffers)
        _check_dtypes("parameter", parameters, "buffer", buffers)
    if len(targets) != len(parameters):
        raise UserError(f"{_NAME}: {len(parameters)} parameters but {len(targets)} targets")
    followed = [i for i, target in enumerate(targets) if target is not None]
    averages = [target for target in targets if target is not None]
    if len(copies or parameters) != len(parameters):
        raise UserError(f"{_NAME}: {len(parameters)} parameters but {len(copies or ())} copies")
    copied = [i for i, copy in enumerate(copies or ()) if copy is not None]
    narrow = [copy for copy in copies or () if copy is not None]
    check_shadows(_NAME, [parameters[i] for i in copied], narrow, "parameter", "copy")
    sources = [parameters[i] for i in followed]
    check_alike(_NAME, "target", averages, "followed parameter", sources)
    _check_dtypes("target", averages, "followed parameter", sources)
    check_targets(_NAME, averages)
    kept = [shadow for shadow in shadows or () if shadow is not None]
    if shadows is not None:
        if [shadow is None for shadow in shadows] != [target is None for target in targets]:
            raise UserError(f"{_NAME}: there must be a shadow for each target, and None where the target is None")
        check_shadows(_NAME, averages, kept)
    if not parameters:
        return
    device = parameters[0].device
    if found_inf is not None and (found_inf.ndim or found_inf.dtype != torch.float32 or found_inf.device != device):
        raise UserError(
            f"{_NAME}: found_inf must be a 0-d float32 tensor on {device}, not {found_inf.dtype} of shape "
            f"{tuple(found_inf.shape)} on {found_inf.device}"
        )
    _sgd_ema_update_(
        list(parameters), list(gradients), list(buffers), averages, kept, narrow, followed, copied,
        lr, momentum, weight_decay, ema, found_inf, implementation,
    )  # fmt: skip


def _check_dtypes(name: str, tensors: Sequence[Tensor], other: str, others: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(tensors, others, strict=True)):
        if a.dtype != b.dtype:
            raise UserError(f"{_NAME}: {name} {i} and {other} {i}: dtypes differ, {a.dtype} and {b.dtype}")


def _update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    targets: list[Tensor],
    shadows: list[Tensor],
    copies: list[Tensor],
    followed: list[int],
    copied: list[int],
    lr: float,
    momentum: float,
    weight_decay: float,
    ema: float,
    found_inf: Tensor | None,
    implementation: str | None,
) -> None:
    written = {
        "parameter": parameters, "buffer": buffers, "target": targets, "shadow": shadows, "copy": copies
    }  # fmt: skip
    check_apart(_NAME, written, {"gradient": gradients})
    run = dispatch.pick("sgd_ema", parameters[0], implementation)
    run(
        parameters, gradients, buffers, targets, shadows, copies, followed, copied,
        lr=lr, momentum=momentum, weight_decay=weight_decay, ema=ema, found_inf=found_inf,
    )  # fmt: skip
    # Written behind autograd's back: a graph that saved one of them must find out, as after any in-place operation.
    torch.autograd.graph.increment_version([*parameters, *buffers, *targets, *shadows, *copies])


_sgd_ema_update_ = define_inplace(
    "sgd_ema_update_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] buffers, Tensor(c!)[] targets, "
    "Tensor(d!)[] shadows, Tensor(e!)[] copies, int[] followed, int[] copied, "
    "float lr, float momentum, float weight_decay, float ema, Tensor? found_inf, str? implementation) -> ()",
    _update,
)


def reference(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    targets: list[Tensor],
    shadows: list[Tensor],
    copies: list[Tensor],
    followed: list[int],
    copied: list[int],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    ema: float,
    found_inf: Tensor | None,
) -> None:
    """Any device, dtype and layout.

    targets[i] is the average of parameters[followed[i]], copies[i] the copy of parameters[copied[i]]. `buffers` may be
    empty, and so may `shadows`, which otherwise are as many as `targets`.
    """
    steps = [gradient.to(parameter.dtype) for gradient, parameter in zip(gradients, parameters, strict=True)]
    if weight_decay:
        steps = list(torch._foreach_add(steps, parameters, alpha=weight_decay))
    if buffers:
        steps = list(torch._foreach_add(torch._foreach_mul(buffers, momentum), steps))
    moved = list(torch._foreach_add(parameters, steps, alpha=-lr))
    if found_inf is not None:
        steps = [torch.where(found_inf == 1, old, new) for old, new in zip(buffers, steps, strict=False)]
        moved = [torch.where(found_inf == 1, old, new) for old, new in zip(parameters, moved, strict=True)]
    if buffers:
        torch._foreach_copy_(buffers, steps)
    torch._foreach_copy_(parameters, moved)
    if copies:
        torch._foreach_copy_(copies, [parameters[i] for i in copied])
    if targets:
        ema_reference(targets, [parameters[i] for i in followed], shadows, ema)


def _native(*lists: Any, found_inf: Tensor | None, **options: float) -> None:
    """C++ for the tensors without gaps of the dtypes it knows, the reference for the rest."""

    def known(row: _Row) -> torch.dtype | None:
        dtype, expected = row[0].dtype, row[0].dtype if row[5] is None else torch.bfloat16
        return dtype if dtype in NATIVE_DTYPES and row[1].dtype == expected else None

    groups = _groups(known, *lists)
    _reference_rows(groups.pop(None, []), **options, found_inf=found_inf)
    for group in groups.values():
        columns = zip(*group, strict=True)
        addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in column] for column in columns]
        sizes = [row[0].numel() for row in group]
        flag = 0 if found_inf is None else found_inf.data_ptr()
        call_native("sgd_ema_update", group[0][0], *addresses, sizes, **options, found_inf=flag)


def _triton(*lists: Any, found_inf: Tensor | None, **options: float) -> None:
    """Triton for float32 tensors without gaps, one launch for each dtype of gradients; the reference for the rest.

    Copies are written after it, by torch.
    """
    from fastmoco.kernels.ema import ELEMENTS
    from fastmoco.kernels.sgd_ema import sgd_ema_update

    def known(row: _Row) -> torch.dtype | None:
        return row[1].dtype if row[0].dtype == torch.float32 and row[1].dtype in ELEMENTS else None

    groups = _groups(known, *lists)
    _reference_rows(groups.pop(None, []), **options, found_inf=found_inf)
    for group in groups.values():
        *columns, copies = zip(*group, strict=True)
        sgd_ema_update(*columns, **options, found_inf=found_inf)
        copied = [(copy, row[0]) for copy, row in zip(copies, group, strict=True) if copy is not None]
        if copied:
            torch._foreach_copy_([copy for copy, _ in copied], [parameter for _, parameter in copied])


# Parameter, gradient, buffer, target, shadow and copy.
_Row = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _groups(
    known: Callable[[_Row], torch.dtype | None],
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    targets: list[Tensor],
    shadows: list[Tensor],
    copies: list[Tensor],
    followed: list[int],
    copied: list[int],
) -> dict[torch.dtype | None, list[_Row]]:
    """The rows by what is `known` of them; those that cannot be taken as flat under None."""
    average, copy = ({i: n for n, i in enumerate(indices)} for indices in (followed, copied))
    groups: dict[torch.dtype | None, list[_Row]] = {}
    for i, parameter in enumerate(parameters):
        row = (
            parameter,
            gradients[i],
            buffers[i] if buffers else None,
            targets[average[i]] if i in average else None,
            shadows[average[i]] if shadows and i in average else None,
            copies[copy[i]] if i in copy else None,
        )
        kind = known(row) if same_order([tensor for tensor in row if tensor is not None]) else None
        groups.setdefault(kind, []).append(row)
    return groups


def _reference_rows(rows: list[_Row], **options: Any) -> None:
    if rows:
        p, g, b, t, s, c = ([tensor for tensor in list_ if tensor is not None] for list_ in zip(*rows, strict=True))
        followed, copied = ([i for i, row in enumerate(rows) if row[column] is not None] for column in (3, 5))
        reference(p, g, b, t, s, c, followed, copied, **options)


dispatch.register("sgd_ema", "reference", reference)
dispatch.register(
    "sgd_ema", "native", _native, device_types=NATIVE_DEVICES, missing=dispatch.NATIVE_MISSING, preferred=True
)
dispatch.register("sgd_ema", "triton", _triton, device_types=("cuda",), missing=dispatch.TRITON_MISSING)
