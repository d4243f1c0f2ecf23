"""solo-learn's names over fused operations: `from fastmoco.adapters.solo import mocov2plus_loss_func`.

Arguments, defaults and values are solo-learn's; docs/adapters.md has what differs and why. solo-learn itself is not
needed.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from fastmoco.adapters import between
from fastmoco.adapters.parts import crosscorr_over_processes, move_average, start_average
from fastmoco.errors import UserError
from fastmoco.ops.infonce import infonce

__all__ = ["MomentumUpdater", "barlow_loss_func", "gather", "initialize_momentum_params", "mocov2plus_loss_func"]


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE of `query` against `key`, both (N, D) of unit length, and the negatives `queue` (D, K): a 0-d tensor.

    Raises UserError (a ValueError) for other shapes.
    """
    if not query.ndim == queue.ndim == 2 or query.shape != key.shape or len(queue) != query.shape[1]:
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(queue.shape)}"
        raise UserError(f"mocov2plus_loss_func: query and key must be (N, D) and queue (D, K), not {shapes}")
    return infonce(query, key, queue.T, temperature=temperature)


def barlow_loss_func(
    z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025, *, plain_all_reduce: bool = False
) -> Tensor:
    """`scale_loss * (sum_i (C_ii - 1)^2 + lamb * sum_{i != j} C_ij^2)` of projections (N, D): a 0-d tensor.

    Over several processes C is their mean. plain_all_reduce: whether the gradient is then the one over the number of
    processes that solo-learn's has, which its learning rates make up for.
    """
    return scale_loss * crosscorr_over_processes(z1, z2, off_diagonal=lamb, exact=not plain_all_reduce)


def gather(X: Tensor, dim: int = 0) -> Tensor:
    """`X` of all processes, joined along `dim`, with the gradients of all of their losses."""
    return between.gather(X.transpose(0, dim)).transpose(0, dim)


def initialize_momentum_params(online_net: nn.Module, momentum_net: nn.Module) -> None:
    """Copy the parameters of `online_net` to `momentum_net`, which is not trained by gradients."""
    start_average(momentum_net, online_net)


class MomentumUpdater:
    """The moving average of weights: its momentum `cur_tau` rises from `base_tau` to `final_tau` by half a cosine.

    Raises UserError (a ValueError) where they are not from 0 to 1, in this order.
    """

    def __init__(self, base_tau: float = 0.996, final_tau: float = 1.0) -> None:
        if not 0 <= base_tau <= final_tau <= 1:
            raise UserError(f"0 <= base_tau <= final_tau <= 1 is wanted, not {base_tau} and {final_tau}")
        self.base_tau, self.cur_tau, self.final_tau = base_tau, base_tau, final_tau

    def update(self, online_net: nn.Module, momentum_net: nn.Module) -> None:
        """Every parameter of `momentum_net` <- cur_tau * itself + (1 - cur_tau) * that of `online_net`."""
        move_average(momentum_net, online_net, self.cur_tau)

    def update_tau(self, cur_step: int, max_steps: int) -> None:
        """Set the momentum for step `cur_step` of `max_steps`."""
        left = (math.cos(math.pi * cur_step / max_steps) + 1) / 2
        self.cur_tau = self.final_tau - (self.final_tau - self.base_tau) * left
