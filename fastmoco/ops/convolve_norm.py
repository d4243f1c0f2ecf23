"""A convolution and the batch normalisation behind it, with addition and ReLU, as one function for autograd.

The arithmetic is that of ops/convolve.py and ops/batch_norm.py, to the last bit. What it saves is Python, whose code
and data the convolutions push out of the caches between: ResNet-50 calls 49 such pairs three times in a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fastmoco.ops import batch_norm, convolve_native
from fastmoco.ops.convolve import convolve_unchecked
from fastmoco.ops.derivatives import differentiated_again
from fastmoco.ops.library import batched

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
    y, statistics, _ = _forward(x, kernel, weight, bias, residual, how)
    return y, statistics


def _forward(
    x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, relu, epsilon = how
    z = convolve_native.convolve(x, kernel, stride, padding)
    if residual is not None and (residual.shape != z.shape or residual.dtype != z.dtype):
        raise ValueError(
            f"convolve_norm: residual must be {tuple(z.shape)} {z.dtype}, not {tuple(residual.shape)} {residual.dtype}"
        )
    y, statistics = batch_norm.native(z, weight, bias, residual, relu, epsilon)
    return y, statistics, z


class _ConvolveNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, kernel, weight, bias, residual, how = args
        y, statistics, z = _forward(x, kernel, weight, bias, residual, how)
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
        dz, dresidual, dweight, dbias = batch_norm.native_backward(dy, z, y, weight, bias, statistics, relu)
        needed = ctx.needs_input_grad
        dx = convolve_native.map_gradient(dz, kernel, x.shape, stride, padding) if needed[0] else None
        dkernel = convolve_native.weight_gradient(x, dz, kernel.shape, stride, padding) if needed[1] else None
        beside = (dy if y is None else dresidual) if needed[4] else None
        return dx, dkernel, dweight, dbias, beside, None


def _differentiable(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the two operations, which have further ones and can be mapped."""
    x, kernel, weight, bias, _, y, _ = ctx.saved_tensors  # type: ignore[attr-defined]
    stride, padding, relu, epsilon = ctx.how  # type: ignore[attr-defined]
    needed = ctx.needs_input_grad  # type: ignore[attr-defined]
    # Where one was made from another, or used before, the derivative must not go on into that: the caller does.
    leaves = [tensor.view_as(tensor) for tensor in (x, kernel, weight, bias)]
    z = convolve_unchecked(leaves[0], leaves[1], stride, padding, None)
    normalised, _ = batch_norm.batch_norm_unchecked(z, leaves[2], leaves[3], None, False, epsilon, None)
    g = torch.where((normalised if y is None else y) <= 0, 0, dy) if relu else dy
    of = [leaf for leaf, wanted in zip(leaves, needed, strict=False) if wanted]
    found = iter(torch.autograd.grad(normalised, of, g, create_graph=True) if of else ())
    gradients = [next(found) if wanted else None for wanted in needed[:4]]
    return *gradients, g if needed[4] else None, None
