"""A convolution, the normalisation behind it, addition and ReLU, as one call where none of the modules has hooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from fastmoco.models.convolution import Convolution
from fastmoco.models.norm import FusedBatchNorm2d, normalize_relu
from fastmoco.ops import batch_norm, convolve_native, dispatch
from fastmoco.ops.convolve_norm import convolve_norm
from fastmoco.ops.library import is_plain, watched


def convolve_normalize_relu(
    conv: nn.Module, norm: nn.Module, relu: nn.Module, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """`relu(norm(conv(x)) + residual)`, and the running statistics with it.

    Of bfloat16 maps on a CPU that C++ convolves and a FusedBatchNorm2d in training normalises, by one function for
    autograd instead of two, and without the calls of the modules. What has hooks is called, and so is all else.
    """
    if type(relu) is not nn.ReLU or _called_otherwise(relu) or not _as_one(conv, norm, x, residual):
        return normalize_relu(norm, relu, conv(x), residual)
    assert isinstance(conv, Convolution) and isinstance(norm, FusedBatchNorm2d) and not isinstance(conv.padding, str)
    how = conv.stride, conv.padding, True, norm.eps
    y, statistics = convolve_norm(x, conv.weight.to(x.dtype), norm.weight, norm.bias, residual, how)
    norm.track(statistics)
    return y


def _as_one(conv: nn.Module, norm: nn.Module, x: Tensor, residual: Tensor | None) -> bool:
    if type(conv) is not Convolution or type(norm) is not FusedBatchNorm2d or x.dtype != torch.bfloat16:
        return False
    if watched() or _called_otherwise(conv) or _called_otherwise(norm) or modules._has_any_global_hook():
        return False
    # A single image may have a single place, which has no variance.
    if conv.form(x) != "convolve" or x.shape[0] < 2 or not norm.takes_batches():
        return False
    # Each a search through the module.
    kernel, weight, bias = conv.weight, norm.weight, norm.bias
    if weight.shape != kernel.shape[:1] or bias.shape != weight.shape or not (weight.is_cpu and bias.is_cpu):
        return False
    if not (is_plain(x) and is_plain(kernel) and is_plain(weight) and is_plain(bias) and is_plain(residual)):
        return False
    if residual is not None and (residual.dtype != x.dtype or residual.shape != conv.result_shape(x)):
        return False
    if residual is not None and not residual.is_cpu:
        return False
    return (
        dispatch.pick("convolve", x) is convolve_native.convolve and dispatch.pick("batch_norm", x) is batch_norm.native
    )


def _called_otherwise(module: nn.Module) -> bool:
    """Whether a call of `module` is more than its class's forward: hooks, a forward of its own, a compiled one."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__ or module._compiled_call_impl is not None
