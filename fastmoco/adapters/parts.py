"""What several adapters compute that is no operation of its own."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import batch_norm

from fastmoco.adapters.between import mean_of_all, world
from fastmoco.ops.crosscorr import crosscorr


def crosscorr_over_processes(z1: Tensor, z2: Tensor, *, off_diagonal: float, exact: bool = True) -> Tensor:
    """`ops.crosscorr` of the mean C of all processes, each standardised over its own images (N, D): a 0-d tensor.

    exact: whether the gradient is C's; else that of a plain all_reduce, one over the number of processes of it.
    """
    if world()[1] == 1:
        return crosscorr(z1, z2, off_diagonal=off_diagonal)
    # Standardised by parts, which the fused operation does not do.
    a, b = (batch_norm(z.float(), None, None, training=True) for z in (z1, z2))
    c = mean_of_all(a.T @ b / len(a), exact=exact)
    diagonal = c.diagonal()
    loss: Tensor = (diagonal - 1).square().sum() + off_diagonal * (c.square().sum() - diagonal.square().sum())
    return loss
