"""Convolution of channels-last maps, and its two gradients, on a CPU.

    y[n, i, j, o] = sum over (k, l, c) of x[n, s i + k - p, s j + l - p, c] weight[o, k, l, c]

What falls on padding is left out, not multiplied with zeros: at 2 x 2 places that is five of nine products of a 3 x 3
kernel, at 4 x 4 three of ten, at 16 x 16 one of twelve. Each place of the map is read where it lies, with no matrix of
windows between (ops/unfold.py), and the gradient to the weights sums along images that are brought side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_input, conv2d_weight

from fastmoco.ops import convolve_native, dispatch
from fastmoco.ops.convolve_native import CHANNELS, SETS, empty, empty_result, runs_native
from fastmoco.ops.library import batched, define, transformed
from fastmoco.ops.precision import no_autocast

# Stride, padding and implementation.
_How = tuple[Sequence[int], Sequence[int], str | None]


def convolve(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    implementation: str | None = None,
) -> Tensor:
    """x, (N, C, H, W), convolved with weight, (O, C, K, L): (N, O, H', W') of x's dtype, channels-last.

    stride and padding are (vertical, horizontal); H' = (H + 2 padding - K) // stride + 1. Sums are in float32 in
    bfloat16 and float32, for any number of threads in the same order. C++ takes Winograd's products where they are the
    faster (ops/convolve_native.py), in bfloat16 for gradients alone. Backward passes differentiate it any
    number of times; torch.func's transforms and forward mode do not.

    `implementation`: "reference" or "native" (on the CPU, float32 with AVX2 or bfloat16 with AVX512-BF16, channels in
    multiples of 32); None has it chosen. C++ also takes maps of fewer channels, where those that a stride across passes
    over fill words of 4 bytes: then the gradients are torch's, and in bfloat16, where a line of the kernel holds an odd
    number of numbers, what is not finite reaches one place more.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for a kernel that is larger than the padded
    map; UserError for an implementation that cannot run here; RuntimeError under torch.func's transforms and forward
    mode.
    """
    if transformed() and not torch.compiler.is_compiling():
        raise RuntimeError("convolve: it has no derivatives for torch.func or forward mode: conv2d has")
    if any(isinstance(of, int) or len(of) != 2 for of in (stride, padding)):
        raise ValueError(f"convolve: stride and padding are two numbers each, not {stride} and {padding}")
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"convolve: x must be (N, C, H, W) and weight (O, C, K, L), not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if not x.is_floating_point() or x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"convolve: x and weight must be of one floating dtype on one device, not {x.dtype} on {x.device} and "
            f"{weight.dtype} on {weight.device}"
        )
    if min(stride) < 1 or min(padding) < 0 or min(weight.shape) < 1:
        raise ValueError(f"convolve: stride {stride} must be at least 1, padding {padding} at least 0")
    if any(side + 2 * more < kernel for side, more, kernel in zip(x.shape[2:], padding, weight.shape[2:], strict=True)):
        raise ValueError(f"convolve: a {tuple(weight.shape)} does not fit in {tuple(x.shape)} padded by {padding}")
    y: Tensor = convolve_unchecked(x, weight, stride, padding, implementation)
    return y


def _pick(
    operation: str, tensor: Tensor, weight_shape: Sequence[int], stride: Sequence[int], implementation: str | None
) -> Callable[..., Any]:
    """The implementation for a map; what C++ does not take goes to the reference, where C++ was not asked for."""
    if not runs_native(tensor.dtype, weight_shape, stride):
        if implementation == "native" and SETS.get(tensor.dtype):
            raise ValueError(
                f"{operation}: C++ takes channels in multiples of {CHANNELS}, fewer of the map where those of a stride "
                f"fill words of 4 bytes, not {weight_shape[1]} and {weight_shape[0]}"
            )
        return dispatch.pick(operation, tensor, implementation or "reference")
    if weight_shape[1] % CHANNELS and operation != "convolve":
        # Of few channels torch's gradients are as fast as those that C++ would make.
        return dispatch.pick(operation, tensor, "reference")
    return dispatch.pick(operation, tensor, implementation)


def _convolve(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], implementation: str | None
) -> Tensor:
    y: Tensor = _pick("convolve", x, weight.shape, stride, implementation)(x, weight, stride, padding)
    return y


def _map_gradient(
    dy: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    implementation: str | None,
) -> Tensor:
    run = _pick("convolve_map_gradient", dy, weight.shape, stride, implementation)
    dx: Tensor = run(dy, weight, shape, stride, padding)
    return dx


def _weight_gradient(
    x: Tensor,
    dy: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    implementation: str | None,
) -> Tensor:
    run = _pick("convolve_weight_gradient", x, shape, stride, implementation)
    dweight: Tensor = run(x, dy, shape, stride, padding)
    return dweight


# A convolution and its two gradients are linear in each of what they take, and the derivatives of one are the others.
# Of many gradients at once torch's own operations are taken, which can be mapped.
def _y(x: Tensor, weight: Tensor, how: _How) -> Tensor:
    mapped = batched(x) or batched(weight)
    y: Tensor = conv2d(x, weight, None, how[0], how[1]) if mapped else convolve_unchecked(x, weight, *how)
    return y


def _dx(dy: Tensor, weight: Tensor, shape: Sequence[int], how: _How) -> Tensor:
    if batched(dy) or batched(weight):
        return conv2d_input(list(shape), weight, dy, how[0], how[1])
    dx: Tensor = _map_gradient_op(dy, weight, shape, *how)
    return dx


def _dweight(x: Tensor, dy: Tensor, shape: Sequence[int], how: _How) -> Tensor:
    if batched(x) or batched(dy):
        return conv2d_weight(x, list(shape), dy, how[0], how[1])
    dweight: Tensor = _weight_gradient_op(x, dy, shape, *how)
    return dweight


def _convolve_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx = _dx(dy, weight, x.shape, ctx.how) if ctx.needs_input_grad[0] else None
    dweight = _dweight(x, dy, weight.shape, ctx.how) if ctx.needs_input_grad[1] else None
    return dx, dweight, None, None, None


def _map_gradients(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight = ctx.saved_tensors
    ddy = _y(ddx, weight, ctx.how) if ctx.needs_input_grad[0] else None
    dweight = _dweight(ddx, dy, weight.shape, ctx.how) if ctx.needs_input_grad[1] else None
    return ddy, dweight, None, None, None, None


def _weight_gradients(ctx: Any, ddweight: Tensor) -> tuple[Tensor | None, ...]:
    x, dy = ctx.saved_tensors
    dx = _dx(dy, ddweight, x.shape, ctx.how) if ctx.needs_input_grad[0] else None
    ddy = _y(x, ddweight, ctx.how) if ctx.needs_input_grad[1] else None
    return dx, ddy, None, None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, *_ = inputs
    ctx.how = inputs[-3:]
    ctx.save_for_backward(first, second)


_HOW = "SymInt[] stride, SymInt[] padding, str? implementation) -> Tensor"
# `convolve` without its checks, a tenth of the time of a small one, for what has made them.
convolve_unchecked: Any = define(
    f"convolve(Tensor x, Tensor weight, {_HOW}",
    _convolve,
    lambda x, weight, stride, padding, _: empty_result(x, weight, stride, padding),
    backward=_convolve_gradients,
    setup_context=_setup_context,
)
_map_gradient_op: Any = define(
    f"convolve_map_gradient(Tensor dy, Tensor weight, SymInt[] shape, {_HOW}",
    _map_gradient,
    lambda dy, weight, shape, *_: empty(dy, shape),
    backward=_map_gradients,
    setup_context=_setup_context,
)
_weight_gradient_op: Any = define(
    f"convolve_weight_gradient(Tensor x, Tensor dy, SymInt[] shape, {_HOW}",
    _weight_gradient,
    lambda x, dy, shape, *_: empty(x, shape),
    backward=_weight_gradients,
    setup_context=_setup_context,
)


def reference(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Any device and dtype: the definition."""
    with no_autocast(x):
        return empty_result(x, weight, stride, padding).copy_(conv2d(x, weight, None, stride, padding))


def reference_map_gradient(
    dy: Tensor, weight: Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Any device and dtype: the definition."""
    with no_autocast(dy):
        return empty(dy, shape).copy_(conv2d_input(list(shape), weight, dy, stride, padding))


def reference_weight_gradient(
    x: Tensor, dy: Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Any device and dtype: the definition."""
    with no_autocast(x):
        return empty(x, shape).copy_(conv2d_weight(x, list(shape), dy, stride, padding))


_IMPLEMENTATIONS: tuple[tuple[str, Callable[..., Tensor], Callable[..., Tensor]], ...] = (
    ("convolve", reference, convolve_native.convolve),
    ("convolve_map_gradient", reference_map_gradient, convolve_native.map_gradient),
    ("convolve_weight_gradient", reference_weight_gradient, convolve_native.weight_gradient),
)
for _operation, _definition, _fast in _IMPLEMENTATIONS:
    dispatch.register_native(
        _operation,
        _definition,
        _fast,
        dtypes=tuple(dtype for dtype, found in SETS.items() if found),
        missing=dispatch.NATIVE_MISSING or ("" if any(SETS.values()) else "this processor has no AVX2"),
    )
