"""What several adapters compute that is no operation of its own."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from fastmoco.adapters.between import mean_of_all, world
from fastmoco.errors import UserError
from fastmoco.ops.crosscorr import crosscorr
from fastmoco.ops.ema import ema_update_


def crosscorr_over_processes(z1: Tensor, z2: Tensor, *, off_diagonal: float, exact: bool = True) -> Tensor:
    """`ops.crosscorr` of the mean C of all processes, each standardised over its own images (N, D): a 0-d tensor.

    exact: whether the gradient is C's; else that of a plain all_reduce, one over the number of processes of it.
    """
    if world().alone:
        return crosscorr(z1, z2, off_diagonal=off_diagonal)
    # Standardised by parts, which the fused operation does not do.
    a, b = (batch_norm(z.float(), None, None, training=True) for z in (z1, z2))
    c = mean_of_all(a.T @ b / len(a), exact=exact)
    diagonal = c.diagonal()
    loss: Tensor = (diagonal - 1).square().sum() + off_diagonal * (c.square().sum() - diagonal.square().sum())
    return loss


@torch.no_grad()
def start_average(average: nn.Module, model: nn.Module) -> None:
    """Have `average` begin with the parameters of `model`, and be trained by no gradients."""
    for own, other in zip(average.parameters(), model.parameters(), strict=True):
        own.copy_(other)
        own.requires_grad_(False)


def move_average(average: nn.Module, model: nn.Module, momentum: float) -> None:
    """Every parameter of `average` <- momentum * itself + (1 - momentum) * that of `model`; buffers stay as they are.

    Raises UserError (a ValueError) where the two have not the same shapes, or `momentum` is not from 0 to 1.
    """
    targets, sources = ([p.detach() for p in net.parameters()] for net in (average, model))
    ema_update_(targets, sources, momentum)


def find_part(who: str, model: nn.Module, name: str) -> nn.Module:
    """The part of `model` that `named_modules` calls `name`, with or without what a wrapper puts before it ("module.").

    Raises UserError, which begins with `who` asks and lists names like it, where there is none.
    """
    parts = dict(model.named_modules(remove_duplicate=False))
    if name and name not in parts and f"module.{name}" in parts:
        return parts[f"module.{name}"]
    if name not in parts or not name:
        near = difflib.get_close_matches(name, parts, n=3, cutoff=0.4) or [part for part in parts if part][:5]
        raise UserError(f"{who}: the model has no part {name!r}; it has {', '.join(near)}, ...")
    return parts[name]
