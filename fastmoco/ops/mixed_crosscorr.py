"""The regulariser of Barlow Twins by mixed samples (Bandara et al. 2023, eq. 5 to 8).

Pictures mixed of the first views and, in another order, of the second, `a x1 + (1 - a) x2[order]`, have to be projected
to what the two projections make when mixed alike. With Z the standardised projections (N, D) the published terms are
squared norms of D x D matrices, `Zm' Z1 / N` less its value `(a Z1 + (1 - a) Z2[order])' Z1 / N` for a linear network,
and the same with Z2. Both have the residual `R = Zm - a Z1 - (1 - a) Z2[order]` in common:

    loss = ||R' Z1 / N||^2 + ||R' Z2 / N||^2 = sum(R R' o (Z1 Z1' + Z2 Z2')) / N^2

so that for batches smaller than the projections are wide N x N matrices do, as in crosscorr_forms.py.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import batch_norm

from fastmoco.ops.crosscorr import GRAM_LIMIT
from fastmoco.ops.crosscorr_forms import EPSILON
from fastmoco.ops.precision import no_autocast, wide


def mix(view1: Tensor, view2: Tensor, order: Tensor, share: Tensor | float) -> Tensor:
    """`share * view1 + (1 - share) * view2[order]` of two views (N, ...): pictures of their dtype."""
    return (share * view1 + (1 - share) * view2[order]).to(view1.dtype)


def mixed_crosscorr(mixed: Tensor, z1: Tensor, z2: Tensor, order: Tensor, share: Tensor | float) -> Tensor:
    """The loss above of projections (N, D) of the mixed pictures and of both views, as a 0-d tensor.

    `order` (N,) int64 and `share`, a number from 0 to 1 or a 0-d tensor of it, are those of `mix`. The arithmetic and
    the loss are float32, or float64 for float64 inputs; gradients reach all three.

    Raises ValueError for shapes that do not fit, or a batch of one.
    """
    if z1.ndim != 2 or not z1.shape == z2.shape == mixed.shape or order.shape != z1.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (mixed, z1, z2, order))
        raise ValueError(f"mixed_crosscorr: mixed, z1 and z2 must be (N, D), order (N,), not {shapes}")
    n, d = z1.shape
    if n < 2:
        raise ValueError(f"mixed_crosscorr: a batch of {n} has no cross-correlation; give at least 2 images a batch")
    with no_autocast(z1):
        m, a, b = (batch_norm(wide(z), None, None, training=True, eps=EPSILON) for z in (mixed, z1, z2))
        residual = m - (share * a + (1 - share) * b[order])
        if n < GRAM_LIMIT * d:
            return ((residual @ residual.T) * (a @ a.T + b @ b.T)).sum() / n**2
        return ((residual.T @ a).square().sum() + (residual.T @ b).square().sum()) / n**2
