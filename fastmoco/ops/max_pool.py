"""The largest of each window over a map (max pooling), with an index of a byte from which the gradient is gathered.

torch keeps an int64 for each place of the result, and a backward of its own puts numbers where they came from. Here a
place of the map adds up what the windows over it took from there: each is written once, by one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from fastmoco.ops import dispatch
from fastmoco.ops.derivatives import differentiated_again
from fastmoco.ops.library import batched, define, transformed
from fastmoco.ops.precision import wide
from fastmoco.ops.unfold import windows

MOST_TAPS = 255
"""Places of a kernel that the index's byte counts."""


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    implementation: str | None = None,
) -> Tensor:
    """The largest of each window of `kernel` over x, (N, C, H, W): (N, C, H', W') of x's dtype, channels-last.

    kernel, stride and padding are (vertical, horizontal); H' = (H + 2 padding - kernel) // stride + 1. As with torch's
    `max_pool2d`, NaN is larger than all else, padding is never taken, and of equal numbers the first has the gradient
    (of several NaN the last), whose sums are in float32 or wider and rounded once. On a CPU deterministic, for any
    number of threads. A backward with `create_graph=True`, or of many gradients at once (`is_grads_batched`), is done
    by torch's own operations. The gradient does not depend on x but by way of the upstream one: where that is a
    constant, it has no graph.

    implementation: "reference" or "native" (bfloat16 and float32 maps on the CPU); None has it chosen.

    Raises ValueError for a map that is not floating or not of four dimensions, for a kernel, stride or padding that are
    not two numbers each or too small, for more than 255 places in a kernel, a padding of more than half of the kernel,
    and a kernel that is larger than the padded map; UserError for an implementation that cannot run here; RuntimeError
    under torch.func's transforms and forward mode.
    """
    if transformed() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "max_pool: it has no derivatives for torch.func or forward mode: torch.nn.functional.max_pool2d has"
        )
    if any(isinstance(of, int) or len(of) != 2 for of in (kernel, stride, padding)):
        raise ValueError(
            f"max_pool: kernel, stride and padding are two numbers each, not {kernel}, {stride}, {padding}"
        )
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"max_pool: x must be a floating (N, C, H, W), not {tuple(x.shape)} {x.dtype}")
    if not fits(x.shape, kernel, stride, padding):
        raise ValueError(_misfit(x.shape, kernel, stride, padding))
    return max_pool_unchecked(x, kernel, stride, padding, implementation)


def max_pool_unchecked(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    implementation: str | None = None,
) -> Tensor:
    """`max_pool` without its checks, for what has made them."""
    y: Tensor
    y, _ = _forward_op(x, kernel, stride, padding, x.requires_grad and torch.is_grad_enabled(), implementation)
    return y


def fits(shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether `max_pool` takes such windows of a map of `shape`, (N, C, H, W)."""
    (_, _, height, width), (kh, kw), (sh, sw), (ph, pw) = shape, kernel, stride, padding
    if kh < 1 or kw < 1 or kh * kw > MOST_TAPS or sh < 1 or sw < 1 or ph < 0 or pw < 0:
        return False
    if 2 * ph > kh or 2 * pw > kw or height < 1 or width < 1:
        return False
    return height + 2 * ph >= kh and width + 2 * pw >= kw


def _misfit(shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> str:
    if min(*kernel, *stride) < 1 or min(padding) < 0:
        return f"max_pool: kernel {kernel} and stride {stride} must be at least 1, padding {padding} at least 0"
    if kernel[0] * kernel[1] > MOST_TAPS:
        return f"max_pool: a kernel of {kernel} has more than {MOST_TAPS} places"
    if any(2 * zeros > covered for zeros, covered in zip(padding, kernel, strict=True)):
        return f"max_pool: padding {padding} must be at most half of the kernel, {kernel}"
    return f"max_pool: a kernel of {kernel} does not fit in a map of {tuple(shape)} padded by {padding}"


def _forward(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    indexed: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    run = dispatch.pick("max_pool", x, implementation)
    result: tuple[Tensor, Tensor] = run(x, kernel, stride, padding, indexed)
    return result


def _backward(
    dy: Tensor,
    index: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    implementation: str | None,
) -> Tensor:
    run = dispatch.pick("max_pool_backward", dy, implementation)
    dx: Tensor = run(dy, index, shape, kernel, stride, padding)
    return dx


def _empty_map(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def _empty_results(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], indexed: bool
) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    shape = n, c, windows(h, kernel[0], stride[0], padding[0]), windows(w, kernel[1], stride[1], padding[1])
    return _empty_map(x, shape), _empty_map(x, shape if indexed else (0, 0, 0, 0), torch.uint8)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.kernel, ctx.stride, ctx.padding, ctx.indexed, ctx.implementation = inputs
    _, index = output
    ctx.shape = x.shape
    ctx.mark_non_differentiable(index)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(index)


def _gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    if not ctx.indexed:
        raise RuntimeError("max_pool: its operation was told that no gradient would be asked for")
    (index,) = ctx.saved_tensors
    if differentiated_again() or batched(dy):
        with torch.enable_grad():
            dx = _scatter(dy, index, ctx.shape, ctx.kernel, ctx.stride, ctx.padding)
    else:
        dx = _backward_op(dy, index, ctx.shape, ctx.kernel, ctx.stride, ctx.padding, ctx.implementation)
    return dx, None, None, None, None, None


_forward_op: Any = define(
    "max_pool(Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding, bool indexed, str? implementation) "
    "-> (Tensor, Tensor)",
    _forward,
    lambda x, kernel, stride, padding, indexed, _: _empty_results(x, kernel, stride, padding, indexed),
    backward=_gradients,
    setup_context=_setup_context,
)
_backward_op: Any = define(
    "max_pool_backward(Tensor dy, Tensor index, SymInt[] shape, SymInt[] kernel, SymInt[] stride, SymInt[] padding, "
    "str? implementation) -> Tensor",
    _backward,
    lambda dy, index, shape, *_: _empty_map(dy, shape),
)


def _corners(across: int, stride: int, padding: int, device: torch.device) -> Tensor:
    """Where along a side windows begin, which may be before it."""
    return torch.arange(across, device=device) * stride - padding


def reference(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], indexed: bool
) -> tuple[Tensor, Tensor]:
    """Any device and dtype: torch's, and its places as taps of the kernel."""
    kernel, stride, padding = tuple(kernel), tuple(stride), tuple(padding)
    y, index = _empty_results(x, kernel, stride, padding, indexed)
    if y.numel() == 0:
        return y, index
    if not indexed:
        return y.copy_(max_pool2d(x, kernel, stride, padding)), index
    largest, place = max_pool2d(x, kernel, stride, padding, return_indices=True)
    top, left = (_corners(*of, x.device) for of in zip(y.shape[2:], stride, padding, strict=True))
    down, across = place // x.shape[3] - top[:, None], place % x.shape[3] - left
    return y.copy_(largest), index.copy_(down * kernel[1] + across)


def reference_backward(
    dy: Tensor,
    index: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """Any device and dtype: the definition."""
    return _empty_map(dy, shape).copy_(_scatter(dy, index, shape, kernel, stride, padding))


def _scatter(
    dy: Tensor,
    index: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """By operations that have derivatives and can be mapped."""
    n, c, h, w = shape
    down, across = index.shape[2:]
    top, left = _corners(down, stride[0], padding[0], dy.device), _corners(across, stride[1], padding[1], dy.device)
    tap = index.long()
    place = (tap // kernel[1] + top[:, None]) * w + tap % kernel[1] + left
    rows, places = (of.permute(0, 2, 3, 1).reshape(n, down * across, c) for of in (wide(dy), place))
    summed = rows.new_zeros((n, h * w, c)).scatter_add(1, places, rows)
    return summed.to(dy.dtype).view(n, h, w, c).permute(0, 3, 1, 2)


_NATIVE_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def _native(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], indexed: bool
) -> tuple[Tensor, Tensor]:
    assert dispatch.native is not None
    x = x.contiguous(memory_format=torch.channels_last)
    y, index = _empty_results(x, kernel, stride, padding, indexed)
    n, c, h, w = x.shape
    dispatch.native.max_pool(
        x.data_ptr(), y.data_ptr(), index.data_ptr() if indexed else 0, map=(n, h, w, c), kernel=kernel, stride=stride,
        padding=padding, dtype=_NATIVE_DTYPES[x.dtype], threads=torch.get_num_threads(),
    )  # fmt: skip
    return y, index


def _native_backward(
    dy: Tensor,
    index: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    assert dispatch.native is not None
    dy, index = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (dy, index))
    dx = _empty_map(dy, shape)
    n, c, h, w = shape
    dispatch.native.max_pool_backward(
        dy.data_ptr(), index.data_ptr(), dx.data_ptr(), map=(n, h, w, c), kernel=kernel, stride=stride,
        padding=padding, dtype=_NATIVE_DTYPES[dy.dtype], threads=torch.get_num_threads(),
    )  # fmt: skip
    return dx


_IMPLEMENTATIONS: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("max_pool", reference, _native),
    ("max_pool_backward", reference_backward, _native_backward),
)
for _name, _definition, _fast in _IMPLEMENTATIONS:
    dispatch.register_native(_name, _definition, _fast, dtypes=tuple(_NATIVE_DTYPES))
