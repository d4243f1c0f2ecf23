"""Batch normalisation in training, with the addition and the ReLU that follow it in a residual network.

    y = act(x_hat * weight + bias + residual)      x_hat = (x - mean) / sqrt(variance + epsilon)

mean and variance are of each channel over batch and places, and act is ReLU or nothing. The map is read twice, for the
statistics and for y, which is rounded once. With g the gradient behind act (dy where y is not at 0) and averages over
batch and places again, the backward is (Ioffe and Szegedy 2015, section 3)

    dbias = sum g      dweight = sum g x_hat
    dx = weight / sqrt(variance + epsilon) * (g - mean g - x_hat mean(g x_hat))

and g is the gradient to the residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmoco.ops import dispatch
from fastmoco.ops.derivatives import differentiated_again
from fastmoco.ops.library import batched, define
from fastmoco.ops.precision import no_autocast, wide


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    epsilon: float = 1e-5,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`act(batch normalisation of x + residual)`, act being ReLU where `relu`, and the statistics it used.

    `x` is (N, C, H, W), `residual` of its shape and dtype, `weight` and `bias` (C,), of any floating dtypes. Returns
    the map in x's dtype and channels-last memory format, and (3, C): mean, 1 / sqrt(biased variance + epsilon) and
    unbiased variance of each channel, float32, or float64 for float64 maps, as the arithmetic is. Gradients reach `x`,
    `weight`, `bias` and `residual`, not through the statistics, which have none themselves. A backward with
    `create_graph=True`, or of many gradients at once (`is_grads_batched`), is done by torch's own operations, which
    normalise once more. Deterministic, for any number of threads.

    implementation: "reference" or "native" (bfloat16 and float32 maps on the CPU); None has it chosen.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for a single value a channel, which has no
    variance.
    """
    if x.ndim != 4 or weight.shape != x.shape[1:2] or bias.shape != weight.shape:
        raise ValueError(
            f"batch_norm: x must be (N, C, H, W), weight and bias (C,), "
            f"not {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if x.numel() < 2 * x.shape[1] or x.numel() == 0:
        raise ValueError(f"batch_norm: a variance needs at least 2 values a channel, not a map of {tuple(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"batch_norm: residual must be {tuple(x.shape)} {x.dtype} as x is, "
            f"not {tuple(residual.shape)} {residual.dtype}"
        )
    if not (x.is_floating_point() and weight.is_floating_point() and bias.is_floating_point()):
        raise ValueError(f"batch_norm: dtypes must be floating, not {x.dtype}, {weight.dtype} and {bias.dtype}")
    if any(tensor is not None and tensor.device != x.device for tensor in (weight, bias, residual)):
        raise ValueError(f"batch_norm: weight, bias and residual must be on x's device, {x.device}")
    y, statistics = batch_norm_unchecked(x, weight, bias, residual, relu, epsilon, implementation)
    return y, statistics


def _empty_map(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.channels_last)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    epsilon: float,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    run = dispatch.pick("batch_norm", x, implementation)
    result: tuple[Tensor, Tensor] = run(x, weight, bias, residual, relu, epsilon)
    return result


def _fake_forward(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_map(x), x.new_empty((3, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))


def _backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    relu: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = dispatch.pick("batch_norm_backward", x, implementation)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = run(dy, x, y, weight, bias, statistics, relu)
    return result


def _fake_backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = x.new_empty(0) if y is None else _empty_map(x)
    return _empty_map(x), dresidual, torch.empty_like(weight), torch.empty_like(bias)


# y only where there was a residual and ReLU follows. Only then is the second result, the residual's gradient, whole.
_backward_op = define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? y, Tensor weight, Tensor bias, Tensor statistics, bool relu, "
    "str? implementation) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, residual, ctx.relu, ctx.epsilon, ctx.implementation = inputs
    y, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    # Without a residual y's sign is cheaper found again from x, which is read anyway.
    ctx.save_for_backward(x, y if ctx.relu and residual is not None else None, weight, bias, statistics)


def _gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    if differentiated_again() or batched(dy):
        with torch.enable_grad():
            return _differentiable_gradients(ctx, dy)
    x, y, weight, bias, statistics = ctx.saved_tensors
    dx, dresidual, dweight, dbias = _backward_op(dy, x, y, weight, bias, statistics, ctx.relu, ctx.implementation)
    beside = (dy if y is None else dresidual) if ctx.needs_input_grad[3] else None
    return dx, dweight, dbias, beside, None, None, None


def _differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of torch's own operations, which have further ones and can be mapped."""
    x, y, weight, bias, _ = ctx.saved_tensors
    # Where one was made from another, or used before, the derivative must not go on into that: the caller does.
    x, weight, bias = (tensor.view_as(tensor) for tensor in (x, weight, bias))
    with no_autocast(x):
        normalised, _ = normalise(wide(x), weight, bias, ctx.epsilon)
        g = torch.where((normalised if y is None else y) <= 0, 0, dy) if ctx.relu else dy
        needed = zip((x, weight, bias), ctx.needs_input_grad[:3], strict=True)
        leaves = [leaf if trained else None for leaf, trained in needed]
        of = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad(normalised, of, g.to(normalised.dtype), create_graph=True) if of else ())
    gradients = [None if leaf is None else next(found) for leaf in leaves]
    return *gradients, g if ctx.needs_input_grad[3] else None, None, None, None


# `batch_norm` without its checks, for what has made them.
batch_norm_unchecked: Any = define(
    "batch_norm(Tensor x, Tensor weight, Tensor bias, Tensor? residual, bool relu, float epsilon, "
    "str? implementation) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    backward=_gradients,
    setup_context=_setup_context,
)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Any device and dtype: the definition."""
    with no_autocast(x):
        y, (mean, invstd, variance) = normalise(wide(x), weight, bias, epsilon)
        if residual is not None:
            y = y + residual
        if relu:
            y = y.relu()
        n = x.numel() // x.shape[1]
        return _map(y, x), torch.stack([mean, invstd, variance * (n / (n - 1))])


def reference_backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, statistics: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Any device and dtype: the definition."""
    with no_autocast(x):
        z, g = wide(x), wide(dy)
        mean, invstd, _ = statistics
        if relu:
            after = affine(z, weight, bias, mean, invstd) if y is None else y
            g = torch.where(after <= 0, 0, g)
        hat = (z - _channels(mean)) * _channels(invstd)
        dbias, dweight = g.sum(dim=(0, 2, 3)), (g * hat).sum(dim=(0, 2, 3))
        n = x.numel() // x.shape[1]
        dx = _channels(weight * invstd) * (g - _channels(dbias / n) - hat * _channels(dweight / n))
        dresidual = x.new_empty(0) if y is None else _map(g, x)
        return _map(dx, x), dresidual, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _channels(row: Tensor) -> Tensor:
    return row[:, None, None]


def normalise(z: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """z normalised, and its mean, 1 / sqrt(biased variance + epsilon) and biased variance."""
    variance, mean = torch.var_mean(z, dim=(0, 2, 3), correction=0)
    invstd = (variance + epsilon).rsqrt()
    return affine(z, weight, bias, mean, invstd), (mean, invstd, variance)


def affine(z: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    return (z - _channels(mean)) * _channels(weight * invstd) + _channels(bias)


def _map(values: Tensor, like: Tensor) -> Tensor:
    return _empty_map(like).copy_(values)


_NATIVE_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    epsilon: float,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `batch_norm`; `in_place` the map is written over x, where that is channels-last."""
    assert dispatch.native is not None
    channels = x.shape[1]
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    y = x if in_place else _empty_map(x)
    statistics = x.new_empty((3, channels), dtype=torch.float32)
    dispatch.native.batch_norm_forward(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        statistics.data_ptr(),
        epsilon=epsilon,
        relu=relu,
        rows=x.numel() // channels,
        channels=channels,
        dtype=_NATIVE_DTYPES[x.dtype],
        threads=torch.get_num_threads(),
    )
    return y, statistics


def native_backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, statistics: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert dispatch.native is not None
    channels = x.shape[1]
    dy, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (dy, x))
    y = None if y is None else y.contiguous(memory_format=torch.channels_last)
    dx, dresidual = _empty_map(x), x.new_empty(0) if y is None else _empty_map(x)
    wide_weight, wide_bias = weight.float().contiguous(), bias.float().contiguous()
    dweight, dbias = torch.empty_like(wide_weight), torch.empty_like(wide_bias)
    dispatch.native.batch_norm_backward(
        dy.data_ptr(),
        x.data_ptr(),
        0 if y is None else y.data_ptr(),
        wide_weight.data_ptr(),
        wide_bias.data_ptr(),
        statistics.data_ptr(),
        dx.data_ptr(),
        0 if y is None else dresidual.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        relu=relu,
        rows=x.numel() // channels,
        channels=channels,
        dtype=_NATIVE_DTYPES[x.dtype],
        threads=torch.get_num_threads(),
    )
    return dx, dresidual, dweight.to(weight.dtype), dbias.to(bias.dtype)


for _name, _definition, _fast in (
    ("batch_norm", reference, native),
    ("batch_norm_backward", reference_backward, native_backward),
):
    dispatch.register_native(_name, _definition, _fast, dtypes=tuple(_NATIVE_DTYPES))
