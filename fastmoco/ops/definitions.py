"""The operations' definitions, written out in plain PyTorch: what every implementation is tested and timed against.

They run in the dtype they are given, float64 for an oracle, and hold whatever intermediate the formula names, however
large. Training never calls them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

# BatchNorm's, which is what the standardisation of the cross-correlation replaces.
EPSILON = 1e-5


def infonce(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    *,
    temperature: float,
    margin: float = 0.0,
    normalized: bool = True,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss, a 0-d tensor, and each query's rank (N,), through the N x (1 + K) logits.

    He et al. 2020, eq. 1; the arguments are those of `fastmoco.ops.infonce.infonce`.
    """
    if not normalized:
        query, key = normalize(query, dim=1), normalize(key, dim=1)
    positive = (query * key).sum(dim=1, keepdim=True)
    negative = query @ bank.T
    if skip is not None:
        left_out = torch.zeros_like(negative, dtype=torch.bool)
        for column in skip.unbind(dim=1):
            rows = (column >= 0).nonzero()[:, 0]
            left_out[rows, column[rows]] = True
        negative = negative.masked_fill(left_out, -torch.inf)
    logits = torch.cat([positive - margin, negative], dim=1) / temperature
    loss = (logits.logsumexp(dim=1) - logits[:, 0]).mean()
    return loss, (negative > positive).sum(dim=1)


def standardize(z: Tensor) -> Tensor:
    """Each column of (..., N, D) `z` with zero mean and unit (biased) variance over the batch."""
    centred = z - z.mean(dim=-2, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim=-2, keepdim=True) + EPSILON)


def crosscorr(z1: Tensor, z2: Tensor, *, off_diagonal: float = 1.0, scale: float = 1.0) -> Tensor:
    """The loss of two (N, D) batches, a 0-d tensor, through the D x D matrix (Zbontar et al. 2021, eq. 1)."""
    c = standardize(z1).T @ standardize(z2) / z1.shape[0]
    on = (c.diagonal() - 1).square().sum()
    # Zeroing the diagonal, rather than subtracting its squares, keeps the small sum exact beside the large one.
    off = (c - torch.diag(c.diagonal())).square().sum()
    return scale * (on + off_diagonal * off)


def pooled_mse(a: Tensor, b: Tensor, *, grid: int) -> Tensor:
    """`mean((pool(a) - pool(b))^2)`, a 0-d tensor; `b` is a map like `a`, or pooled already."""
    return (adaptive_avg_pool2d(a, grid) - adaptive_avg_pool2d(b, grid)).square().mean()
