"""The two forms of the cross-correlation loss and its gradients, between the products of matrices and around them.

With Z1 and Z2 the standardised (N, D) batches, `C = Z1' Z2 / N` and c its diagonal, the loss is

    scale * (sum_i (c_i - 1)^2 + lam * (||C||^2 - sum_i c_i^2))

Batches are mostly smaller than the projections are wide, so the N x N Gram matrices `G = Z Z'` stand in for the D x D
matrix C: `||Z1' Z2||^2 = tr(Z1 Z1' Z2 Z2') = sum(G1 o G2)`, for 8 N^2 D operations with the gradients in place of
6 N D^2:

    dZ1 = (2 scale / N) * (lam * G2 Z1 / N + Z2 * ((1 - lam) * c - 1))        and the same with 1 and 2 exchanged
    dz  = r * (dZ - Z * mean_n(dZ * Z)),    r = 1 / sqrt(variance + epsilon)

(A standardisation's gradient has mean_n dZ subtracted too, which is zero here, as the mean over n of Z is.)
Loss and gradients come out together: the Gram matrices serve both and neither they nor Z are kept. In float32 this
grouping of the terms matters: written as a polynomial in C and I it loses one to two digits of the gradient.

So does G's diagonal, which is as large as D: what it gives to G Z is a multiple t of Z itself, of which the last line
leaves next to nothing, `t * Z * (1 - mean_n(Z * Z)) = t * epsilon * r^2 * Z`. So that is added, and the mean of the
diagonal taken from it beforehand; likewise the mean of the rest, of which nothing is left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco.ops.precision import no_autocast, wide

# BatchNorm's, which is what the standardisation replaces.
EPSILON = 1e-5


class Passes(NamedTuple):
    """What lies between the matrix products.

    standardize(z1, z2) -> both standardised over dimension 1, the factors r (S, D) that made them so, and C's diagonal.
    gradient(left, right, alpha, other, weight, s, r) -> the gradient to z of what has the gradient
        `alpha * left @ right + other * weight` to `s`; all columns of the product and of `other` sum to zero.
    """

    standardize: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, float, Tensor, Tensor, Tensor, Tensor], Tensor]


def by_passes(
    passes: Passes, z1: Tensor, z2: Tensor, off_diagonal: float, scale: float, form: str, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (S,) of pairs (S, N, D) and the gradients to both, or two of (S, 0, D); `form` "gram" or "direct"."""
    with no_autocast(z1):
        return _run(passes, z1, z2, off_diagonal, scale, form, gradients)


def _run(
    passes: Passes, z1: Tensor, z2: Tensor, off_diagonal: float, scale: float, form: str, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n = z1.shape[1]
    s1, s2, r1, r2, diagonal = passes.standardize(z1, z2)
    if form == "gram":
        g1, g2 = torch.bmm(s1, s1.mT), torch.bmm(s2, s2.mT)
        off = (g1 * g2).sum(dim=(1, 2)).div_(n**2).sub_(diagonal.square().sum(dim=1))
        weight = diagonal.mul(1 - off_diagonal).sub_(1)
        factors1, factors2, alpha = (g2, s1), (g1, s2), off_diagonal / n
    else:
        c = torch.bmm(s1.mT, s2).div_(n)
        # With C at hand its diagonal is left out, rather than subtracted, and the small sum stays exact.
        c.diagonal(dim1=1, dim2=2).zero_()
        off = c.square().sum(dim=(1, 2))
        weight = diagonal - 1
        factors1, factors2, alpha = (s2, c.mT), (s1, c), off_diagonal
    loss = (diagonal - 1).square_().sum(dim=1).add_(off, alpha=off_diagonal).mul_(scale)
    if not gradients:
        dz1, dz2 = (s1.new_empty((len(s1), 0, s1.shape[2])) for _ in range(2))
        return loss, dz1, dz2
    alpha *= 2 * scale / n
    weight *= 2 * scale / n
    taken = [_take_diagonal(g) for g in (g2, g1)] if form == "gram" else []
    dz1 = passes.gradient(*factors1, alpha, s2, weight, s1, r1)
    dz2 = passes.gradient(*factors2, alpha, s1, weight, s2, r2)
    if taken:
        for more, dz, s, r in zip(taken, (dz1, dz2), (s1, s2), (r1, r2), strict=True):
            dz.addcmul_(s, (r**3 * (alpha * EPSILON * more))[:, None])
    return loss, dz1, dz2


def _take_diagonal(g: Tensor) -> Tensor:
    """Takes from Gram matrices (S, N, N), in place, the mean beside the diagonal and what the diagonal has above it.

    Returns the latter, (S, 1).
    """
    n = g.shape[1]
    diagonal = g.diagonal(dim1=1, dim2=2)
    trace = diagonal.sum(dim=1, keepdim=True)
    rest = (g.sum(dim=(1, 2))[:, None] - trace) / (n * (n - 1))
    more = trace / n - rest
    g -= rest[:, None]
    diagonal -= more
    return more


def _standardize(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    s1, s2 = (_centred(_centred(wide(z))) for z in (z1, z2))
    r1, r2 = (s.square().mean(dim=1).add_(EPSILON).rsqrt_() for s in (s1, s2))
    s1 *= r1[:, None]
    s2 *= r2[:, None]
    return s1, s2, r1, r2, (s1 * s2).mean(dim=1)


def _centred(z: Tensor) -> Tensor:
    """Each column less its mean; twice, so that of a column far from zero what rounding left of the mean goes too."""
    return z - z.mean(dim=1, keepdim=True)


def _gradient(
    left: Tensor, right: Tensor, alpha: float, other: Tensor, weight: Tensor, s: Tensor, r: Tensor
) -> Tensor:
    ds = torch.baddbmm(other * weight[:, None], left, right, alpha=alpha)
    ds.addcmul_(s, (ds * s).mean(dim=1, keepdim=True), value=-1)
    return ds.mul_(r[:, None])


# Any device and dtype.
reference = partial(by_passes, Passes(_standardize, _gradient))
