"""Cross-correlation losses of two batches of projections (Zbontar et al. 2021, eq. 1; Kaku et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco.ops import dispatch
from fastmoco.ops.precision import no_autocast, wide

# BatchNorm's, which is what the standardisation replaces.
EPSILON = 1e-5


def crosscorr(
    z1: Tensor, z2: Tensor, *, off_diagonal: float = 1.0, scale: float = 1.0, implementation: str | None = None
) -> Tensor:
    """`scale * (sum_i (C_ii - 1)^2 + off_diagonal * sum_{i != j} C_ij^2)` of `C = s(z1)' s(z2) / N`: a 0-d tensor.

    `z1` and `z2` are (N, D) of any floating dtype; `s` standardises each column over the batch (zero mean, unit
    biased variance, epsilon 1e-5), as a BatchNorm without affine parameters would. `off_diagonal` is 1 in the
    intermediate-layer paper, where the loss is `scale * ||C - I||^2`, and 0.005 in Barlow Twins. The arithmetic and
    the result are float32, or float64 for float64 inputs. Gradients reach both.

    Raises ValueError for shapes that differ, or a batch of one, which has no correlation.
    """
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"crosscorr: two (N, D) batches of one shape, not {tuple(z1.shape)} and {tuple(z2.shape)}")
    if z1.shape[0] < 2:
        raise ValueError("crosscorr: a batch of 1 has no cross-correlation; give at least 2 images a batch")
    with no_autocast(z1):
        run = dispatch.pick("crosscorr", z1, implementation)
        return run(wide(z1), wide(z2), off_diagonal, scale)


def standardize(z: Tensor) -> Tensor:
    """Each column of (N, D) `z` with zero mean and unit (biased) variance over the batch."""
    centred = z - z.mean(dim=0)
    return centred * torch.rsqrt(centred.square().mean(dim=0) + EPSILON)


def reference(z1: Tensor, z2: Tensor, off_diagonal: float, scale: float) -> Tensor:
    """The definition, written out, with the D x D matrix in memory."""
    c = standardize(z1).T @ standardize(z2) / z1.shape[0]
    on = (c.diagonal() - 1).square().sum()
    # Zeroing the diagonal, rather than subtracting its squares, keeps the small sum exact beside the large one.
    off = (c - torch.diag(c.diagonal())).square().sum()
    return scale * (on + off_diagonal * off)


dispatch.register("crosscorr", "reference", reference)
