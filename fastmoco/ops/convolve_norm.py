"""A convolution and the batch normalisation behind it, with addition and ReLU, as one function for autograd.

The arithmetic is that of ops/convolve.py and ops/batch_norm.py, to the last bit. What it saves is Python, whose code
and data the convolutions push out of the caches between: ResNet-50 calls 49 such pairs three times in a step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import conv2d

from fastmoco.ops import batch_norm, convolve_native
from fastmoco.ops.convolve_native import CHANNELS
from fastmoco.ops.derivatives import differentiated_again
from fastmoco.ops.library import batched, is_plain, watched
from fastmoco.ops.precision import no_autocast, wide

# Stride, padding, whether ReLU follows, and what is added to the variance.
How = tuple[tuple[int, ...], tuple[int, ...], bool, float]


def convolve_norm(
    x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, how: How
) -> tuple[Tensor, Tensor]:
    """`batch_norm(convolve(x, kernel), weight, bias, residual=residual)` and its statistics, for what C++ takes of
    either and nothing watches.

    x (N, C, H, W), kernel (O, C, K, L), residual (N, O, H', W') of one dtype; weight and bias (O,). The caller has
    checked that they fit, but for the residual. Derivatives of any order, as either has them.

    Raises ValueError for a residual of another shape or dtype than the result's.
    """
    trained = (x, kernel, weight, bias) if residual is None else (x, kernel, weight, bias, residual)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained):
        result: tuple[Tensor, Tensor] = _ConvolveNorm.apply(x, kernel, weight, bias, residual, how)
        return result
    # What has no backward to come needs the convolved map no more: normalised where it lies, still in the caches.
    y, statistics, _ = _forward(x, kernel, weight, bias, residual, how, in_place=True)
    return y, statistics


def _forward(
    x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, how: How, *, in_place: bool
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, relu, epsilon = how
    z = convolve_native.convolve(x, kernel, stride, padding)
    if residual is not None and (residual.shape != z.shape or residual.dtype != z.dtype):
        raise ValueError(
            f"convolve_norm: residual must be {tuple(z.shape)} {z.dtype}, not {tuple(residual.shape)} {residual.dtype}"
        )
    y, statistics = batch_norm.native(z, weight, bias, residual, relu, epsilon, in_place=in_place)
    return y, statistics, z


class _ConvolveNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, kernel, weight, bias, residual, how = args
        y, statistics, z = _forward(x, kernel, weight, bias, residual, how, in_place=False)
        ctx.how = how
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, kernel, weight, bias, z, y if how[2] and residual is not None else None, statistics)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        if differentiated_again() or batched(dy):
            with torch.enable_grad():
                return _differentiable(ctx, dy)
        x, kernel, weight, bias, z, y, statistics = ctx.saved_tensors
        stride, padding, relu, _epsilon = ctx.how
        needed = ctx.needs_input_grad
        operations: tuple[Any, Any, Any] = _DIRECTLY
        if watched() or not is_plain(dy) or x.shape[1] % CHANNELS:
            operations = _by_dispatcher()
        normalise, to_map, to_weights = operations
        dz, dresidual, dweight, dbias = normalise(dy, z, y, weight, bias, statistics, relu)
        dx = to_map(dz, kernel, x.shape, stride, padding) if needed[0] else None
        dkernel = to_weights(x, dz, kernel.shape, stride, padding) if needed[1] else None
        beside = (dy if y is None else dresidual) if needed[4] else None
        return dx, dkernel, dweight, dbias, beside, None


_DIRECTLY = batch_norm.native_backward, convolve_native.map_gradient, convolve_native.weight_gradient


def _by_dispatcher() -> tuple[Any, Any, Any]:
    """The same by way of torch's dispatcher, for what watches it, and for gradients that C++ does not make."""
    names = "batch_norm_backward", "convolve_map_gradient", "convolve_weight_gradient"
    first, second, third = (partial(_chosen, getattr(torch.ops.fastmoco, name)) for name in names)
    return first, second, third


def _chosen(operation: Any, *args: Any) -> Any:
    return operation(*args, None)


def _differentiable(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of torch's own operations, which have further ones and can be mapped."""
    x, kernel, weight, bias, z, y, (mean, invstd, _) = ctx.saved_tensors  # type: ignore[attr-defined]
    stride, padding, relu, epsilon = ctx.how  # type: ignore[attr-defined]
    needed = ctx.needs_input_grad  # type: ignore[attr-defined]
    # Where one was made from another, or used before, the derivative must not go on into that: the caller does.
    leaves = [tensor.view_as(tensor) for tensor in (x, kernel, weight, bias)]
    with no_autocast(x):
        convolved = conv2d(wide(leaves[0]), wide(leaves[1]), None, stride, padding)
        normalised, _ = batch_norm.normalise(convolved, leaves[2], leaves[3], epsilon)
        # Where the forward's own were: this one is rounded otherwise.
        after = batch_norm.affine(wide(z), weight, bias, mean, invstd).detach() if y is None else y
        g = torch.where(after <= 0, 0, dy) if relu else dy
        of = [leaf for leaf, wanted in zip(leaves, needed, strict=False) if wanted]
        found = iter(torch.autograd.grad(normalised, of, g.to(normalised.dtype), create_graph=True) if of else ())
    gradients = [next(found) if wanted else None for wanted in needed[:4]]
    return *gradients, g if needed[4] else None, None
