"""The neighbourhoods of a map as the rows of a matrix, and their sums back in a map: each is the other's gradient.

With a kernel of K places, `unfold(x)` has for each window, in the order in which a convolution moves it over x, the
K C numbers that it covers, place by place, all channels of a place together; 0 where it covers padding. A convolution
is then `unfold(x) @ weight.T`, with weights of (C_out, K C). `fold(rows)` puts each number back where it came from and
adds up those that meet. A channels-last map lies in memory so that both move whole vectors of channels (torch's own
operations of these names have the places of a channel together, and channels first).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmoco.ops import dispatch
from fastmoco.ops.library import define, transformed
from fastmoco.ops.precision import wide


def unfold(
    x: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    implementation: str | None = None,
) -> Tensor:
    """The windows of `kernel` over x, (N, C, H, W), as a matrix (N H' W', kernel[0] kernel[1] C) of x's dtype.

    kernel, stride and padding are (vertical, horizontal); H' = (H + 2 padding - kernel) // stride + 1. Backward passes
    differentiate it any number of times; torch.func's transforms and forward mode do not. `implementation`: "reference"
    or "native" (on the CPU, not in float16); None has it chosen.

    Raises ValueError for a map that is not floating or not of four dimensions, for a kernel, stride or padding that are
    not two numbers each or too small, and for a kernel that is larger than the padded map; UserError for an
    implementation that cannot run here; RuntimeError under torch.func's transforms and forward mode.
    """
    if transformed() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "unfold: it has no derivatives for torch.func or forward mode: torch.nn.functional.unfold has"
        )
    if any(isinstance(of, int) or len(of) != 2 for of in (kernel, stride, padding)):
        raise ValueError(f"unfold: kernel, stride and padding are two numbers each, not {kernel}, {stride}, {padding}")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"unfold: x must be a floating (N, C, H, W), not {tuple(x.shape)} {x.dtype}")
    if min(*kernel, *stride) < 1 or min(padding) < 0:
        raise ValueError(
            f"unfold: kernel {kernel} and stride {stride} must be at least 1, padding {padding} at least 0"
        )
    if any(side + 2 * zeros < covered for side, zeros, covered in zip(x.shape[2:], padding, kernel, strict=True)):
        raise ValueError(f"unfold: a kernel of {kernel} does not fit in a map of {tuple(x.shape)} padded by {padding}")
    rows: Tensor = _unfold_op(x, kernel, stride, padding, implementation)
    return rows


def windows(side: int, kernel: int, stride: int, padding: int) -> int:
    """How many places a kernel has along a side."""
    return (side + 2 * padding - kernel) // stride + 1


def _unfold(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], implementation: str | None
) -> Tensor:
    rows: Tensor = dispatch.pick("unfold", x, implementation)(x, kernel, stride, padding)
    return rows


def _fold(
    rows: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    implementation: str | None,
) -> Tensor:
    x: Tensor = dispatch.pick("fold", rows, implementation)(rows, shape, kernel, stride, padding)
    return x


def _empty_rows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    down, across = (windows(*of) for of in zip(x.shape[2:], kernel, stride, padding, strict=True))
    return x.new_empty((x.shape[0] * down * across, kernel[0] * kernel[1] * x.shape[1]))


def _empty_map(rows: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=rows.dtype, device=rows.device, memory_format=torch.channels_last)


def _unfold_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.windows = inputs
    ctx.shape = x.shape


def _fold_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *ctx.windows = inputs


_unfold_op: Any = define(
    "unfold(Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding, str? implementation) -> Tensor",
    _unfold,
    lambda x, kernel, stride, padding, _: _empty_rows(x, kernel, stride, padding),
    backward=lambda ctx, drows: (_fold_op(drows, ctx.shape, *ctx.windows), None, None, None, None),
    setup_context=_unfold_context,
)
_fold_op: Any = define(
    "fold(Tensor rows, SymInt[] shape, SymInt[] kernel, SymInt[] stride, SymInt[] padding, str? implementation) "
    "-> Tensor",
    _fold,
    lambda rows, shape, *_: _empty_map(rows, shape),
    backward=lambda ctx, dx: (_unfold_op(dx, *ctx.windows), None, None, None, None, None),
    setup_context=_fold_context,
)


def _places(padded: Tensor, kernel: Sequence[int], stride: Sequence[int], down: int, across: int) -> list[Tensor]:
    """What each place of the kernel covers of a padded (N, H, W, C), (N, down, across, C)."""
    (sh, sw) = stride
    return [
        padded[:, i : i + sh * (down - 1) + 1 : sh, j : j + sw * (across - 1) + 1 : sw]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]


def reference_unfold(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Any device and dtype: the definition."""
    down, across = (windows(*of) for of in zip(x.shape[2:], kernel, stride, padding, strict=True))
    padded = pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    places = torch.stack(_places(padded, kernel, stride, down, across), dim=3)
    # Copied: what an operation returns is no view.
    rows = _empty_rows(x, kernel, stride, padding)
    rows.view(places.shape).copy_(places)
    return rows


def reference_fold(
    rows: Tensor, shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Any device and dtype: the definition, summed in float32 or wider."""
    n, c, h, w = shape
    down, across = (windows(*of) for of in zip((h, w), kernel, stride, padding, strict=True))
    (ph, pw) = padding
    total = wide(rows.new_zeros((n, h + 2 * ph, w + 2 * pw, c)))
    parts = rows.reshape(n, down, across, kernel[0] * kernel[1], c).unbind(3)
    for place, part in zip(_places(total, kernel, stride, down, across), parts, strict=True):
        place += part
    return _empty_map(rows, shape).copy_(total[:, ph : ph + h, pw : pw + w].permute(0, 3, 1, 2))


def _layout(
    shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> dict[str, Any]:
    """What C++ is told of a map's and its windows' sizes, and of threads."""
    n, c, h, w = shape
    sizes = {"map": (n, h, w, c), "kernel": tuple(kernel), "stride": tuple(stride), "padding": tuple(padding)}
    return sizes | {"threads": torch.get_num_threads()}


def _native_unfold(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    assert dispatch.native is not None
    x, rows = x.contiguous(memory_format=torch.channels_last), _empty_rows(x, kernel, stride, padding)
    dispatch.native.unfold(
        x.data_ptr(),
        rows.data_ptr(),
        **_layout(x.shape, kernel, stride, padding),
        element=x.element_size(),
    )
    return rows


def _native_fold(
    rows: Tensor, shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    assert dispatch.native is not None
    rows, x = rows.contiguous(), _empty_map(rows, shape)
    dispatch.native.fold(
        rows.data_ptr(),
        x.data_ptr(),
        **_layout(shape, kernel, stride, padding),
        dtype=str(rows.dtype).removeprefix("torch."),
    )
    return x


_IMPLEMENTATIONS: tuple[tuple[str, Callable[..., Tensor], Callable[..., Tensor]], ...] = (
    ("unfold", reference_unfold, _native_unfold),
    ("fold", reference_fold, _native_fold),
)
for _name, _definition, _fast in _IMPLEMENTATIONS:
    dispatch.register_native(_name, _definition, _fast, dtypes=(torch.bfloat16, torch.float32, torch.float64))
