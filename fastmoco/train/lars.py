"""A step of LARS, which keeps large batches trainable: each weight tensor moves in proportion to its own length.

    g += weight_decay * p;   g *= trust * |p| / |g|;   b <- momentum * b + g;   p -= lr * b

You et al. 2017, in the order of Barlow Twins and solo-learn: the learning rate is outside the momentum, and biases and
the parameters of BatchNorm, the tensors of one dimension, take neither weight decay nor the factor.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def lars_update_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust: float,
    blocked: Tensor,
) -> None:
    """One step on `parameters`, in place; the host reads nothing back.

    parameters: floating-point tensors of any shapes, of one dtype and on one device.
    gradients: as many, of the same shapes; another dtype is converted to the parameter's.
    buffers: the momentum, as many, of their shapes and dtype, zeros before the first step; none where momentum is 0.
    blocked: 0-d tensor on that device; where it is 1, parameters and buffers stay as they are.

    A weight or a gradient of length 0 has the factor 1.
    """
    if not parameters:
        return
    steps = [gradient.to(parameter.dtype) for gradient, parameter in zip(gradients, parameters, strict=True)]
    adapted = [i for i, parameter in enumerate(parameters) if parameter.ndim > 1]
    weights = [parameters[i] for i in adapted]
    decayed = list(torch._foreach_add([steps[i] for i in adapted], weights, alpha=weight_decay))
    scaled = torch._foreach_mul(decayed, _factors(weights, decayed, trust)) if adapted else ()
    for i, step in zip(adapted, scaled, strict=True):
        steps[i] = step
    # A blocked step's gradient may be NaN, so it is replaced and not multiplied by 0.
    stop = blocked == 1
    steps = [torch.where(stop, torch.zeros_like(step), step) for step in steps]
    if buffers:
        kept = torch.full((), momentum, dtype=steps[0].dtype, device=steps[0].device).masked_fill(stop, 1.0)
        torch._foreach_mul_(buffers, kept)
        torch._foreach_add_(buffers, steps)
        rate = torch.full_like(kept, -lr).masked_fill(stop, 0.0)
        steps = list(torch._foreach_mul(buffers, rate))
    else:
        torch._foreach_mul_(steps, -lr)
    torch._foreach_add_(parameters, steps)


def _factors(weights: list[Tensor], steps: list[Tensor], trust: float) -> list[Tensor]:
    """For each weight trust * |weight| / |step|, 0-d, in its dtype."""
    lengths, moves = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, steps))
    factors = torch.where((lengths > 0) & (moves > 0), trust * lengths / moves, torch.ones_like(moves))
    return list(factors.unbind())
