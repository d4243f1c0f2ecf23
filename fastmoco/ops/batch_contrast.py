"""Contrastive losses whose negatives are the other images of the batch, over the operation of infonce.py.

With z the 2N unit vectors of both views and j(i) the other view of i, the operation gives for each i, its own row and
its other view's left out of the negatives,

    l_i = logsumexp_{a != i}(z_i . z_a / t) - z_i . z_j(i) / t

which is NT-Xent (Chen et al. 2020, eq. 1). Of a supervised contrastive loss (Khosla et al. 2020, eq. 2) the first term
is the same, and the second has the mean of all P(i) of i's class in place of the other view. It is linear in them: what
is to be added to the mean of l_i needs each class's sum of vectors, and nothing of size N x N.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastmoco.ops.infonce import Ranked, infonce_ranked
from fastmoco.ops.precision import wide


def ntxent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float,
    margin: float = 0.0,
    everyone: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
    implementation: str | None = None,
) -> Ranked:
    """NT-Xent of two views' embeddings (N, D) of any length, each the positive of the other (SimCLR).

    The loss is a 0-d tensor of float32, or float64 for float64 inputs; the rank (2N,) int64 of each row of `z1`, then
    of `z2`, is how many negatives are more similar to it than its other view. Gradients reach every input.

    temperature: divides the similarities; one below 0 turns them round.
    margin: subtracted from the similarity of the two views, which then have to be that much more similar than others
        (Lepage and Dehak 2023; of softmax classifiers Wang et al. 2018).
    everyone: the embeddings (M, D) of both views of all processes' images, of which `z1` and `z2` are the rows from
        `first` on; those of this batch alone where it is None.

    Raises ValueError for shapes that do not fit or a temperature of 0.
    """
    _check("ntxent", z1, z2)
    z1, z2 = normalize(wide(z1), dim=1), normalize(wide(z2), dim=1)
    of_all = (z1, z2) if everyone is None else tuple(normalize(wide(z), dim=1) for z in everyone)
    return _ntxent(z1, z2, of_all, first, temperature, margin, implementation)


def _ntxent(
    z1: Tensor,
    z2: Tensor,
    everyone: tuple[Tensor, ...],
    first: int,
    temperature: float,
    margin: float,
    implementation: str | None,
) -> Ranked:
    """`ntxent` of unit vectors."""
    all1, all2 = everyone
    own = torch.arange(first, first + len(z1), device=z1.device)
    # Neither its own row is a negative of a view nor the other view of its image, the positive.
    skip = torch.stack([own, own + len(all1)], dim=1)
    query = torch.cat([z1, z2]) if temperature > 0 else -torch.cat([z1, z2])
    return infonce_ranked(
        query, torch.cat([z2, z1]), torch.cat([all1, all2]), temperature=abs(temperature), margin=margin,
        skip=torch.cat([skip, skip]), implementation=implementation,
    )  # fmt: skip


def supcon(
    z1: Tensor, z2: Tensor, targets: Tensor, *, temperature: float, implementation: str | None = None
) -> Ranked:
    """The supervised contrastive loss of two views' embeddings (N, D) of any length: the positives of a view are the
    other view and both views of all images of its class (Khosla et al. 2020, L_out).

    `targets` (N,) int64 are the classes; an image of target -1 is of unknown class and has its other view alone.
    Loss, rank (which counts the class among the negatives), dtypes and gradients are as of `ntxent`, with which it is
    equal where no two images share a class.

    Raises ValueError as `ntxent` does, and where the targets do not fit.
    """
    _check("supcon", z1, z2)
    if targets.shape != z1.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"supcon: targets must be ({len(z1)},) int64, not {tuple(targets.shape)} {targets.dtype}")
    z1, z2 = normalize(wide(z1), dim=1), normalize(wide(z2), dim=1)
    found = _ntxent(z1, z2, (z1, z2), 0, temperature, 0.0, implementation)
    group = _groups(targets)
    counts = torch.zeros_like(group).index_add_(0, group, torch.ones_like(group))[group, None]
    both = torch.zeros_like(z1).index_add(0, group, z1 + z2)[group]
    # Of 2 n_c views of the class, without the view itself.
    positives = 2 * counts - 1
    instead = (z1 * (z2 - (both - z1) / positives) + z2 * (z1 - (both - z2) / positives)).sum()
    return Ranked(found.loss + instead / (2 * len(z1) * temperature), found.rank)


def _groups(targets: Tensor) -> Tensor:
    """(N,) numbers below N, equal where targets are equal and not -1; found without asking the device how many."""
    # The unknown ones get numbers that nobody has.
    unknown = -1 - torch.arange(len(targets), device=targets.device)
    ordered, order = torch.where(targets < 0, unknown, targets).sort(stable=True)
    begins = torch.zeros_like(ordered)
    begins[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).index_copy_(0, order, begins.cumsum(0))


def _check(name: str, z1: Tensor, z2: Tensor) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"{name}: z1 and z2 must be (N, D) and alike, not {tuple(z1.shape)} and {tuple(z2.shape)}")
