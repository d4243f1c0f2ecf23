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


def supcon(
    z1: Tensor, z2: Tensor, targets: Tensor, *, temperature: float, margin: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss, a 0-d tensor, and each view's rank (2N,), through the 2N x 2N logits (Khosla et al. 2020, eq. 2,
    L_out).

    With targets that all differ it is NT-Xent (Chen et al. 2020, eq. 1), of which `margin` lowers the similarity of the
    positives (Lepage and Dehak 2023). An image of target -1 has no class-mates.
    """
    n = len(z1)
    z, classes = normalize(torch.cat([z1, z2]), dim=1), torch.cat([targets, targets])
    image = torch.arange(2 * n, device=z.device) % n
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    other_view = (image[:, None] == image) & ~itself
    mates = (classes[:, None] == classes) & (classes >= 0)
    positives = (mates | other_view) & ~itself
    similarity = z @ z.T
    own = similarity[other_view]
    rank = ((similarity > own[:, None]) & ~itself & ~other_view).sum(dim=1)
    # Lowered for the view whose loss it is, wherever it stands.
    logits = ((similarity - margin * other_view.to(z)) / temperature).masked_fill(itself, -torch.inf)
    log_share = logits - logits.logsumexp(dim=1, keepdim=True)
    each = log_share.masked_fill(~positives, 0.0).sum(dim=1) / positives.sum(dim=1)
    return -each.mean(), rank


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


def mixed_crosscorr(mixed: Tensor, z1: Tensor, z2: Tensor, order: Tensor, share: float) -> Tensor:
    """The regulariser by mixed samples of (N, D) projections, a 0-d tensor, through D x D matrices (Bandara et al.
    2023, eq. 5 to 8)."""
    m, a, b = standardize(mixed), standardize(z1), standardize(z2)
    loss = torch.zeros((), dtype=z1.dtype, device=z1.device)
    for view in (a, b):
        expected = share * (a.T @ view) + (1 - share) * (b[order].T @ view)
        loss = loss + ((m.T @ view - expected) / len(z1)).square().sum()
    return loss


def pooled_mse(a: Tensor, b: Tensor, *, grid: int) -> Tensor:
    """`mean((pool(a) - pool(b))^2)`, a 0-d tensor; `b` is a map like `a`, or pooled already."""
    return (adaptive_avg_pool2d(a, grid) - adaptive_avg_pool2d(b, grid)).square().mean()
