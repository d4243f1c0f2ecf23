"""InfoNCE's loss and gradients in one sweep over slices of the bank, for any device and dtype (see infonce.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco.ops.precision import wide

# torch.nn.functional.normalize's.
NORM_EPSILON = 1e-12

# Elements of a slice's logits in the plain implementation: 4 MiB of float32.
SLICE_ELEMENTS = 1 << 20


class Options(NamedTuple):
    """What an implementation is told beside its tensors; the first three are `infonce_ranked`'s.

    `fixed_maximum`: 1/temperature bounds every logit. `key_gradient`: whether the gradient to the key is wanted.
    """

    temperature: float
    margin: float
    normalized: bool
    fixed_maximum: bool
    key_gradient: bool


# Loss (), rank (N,) int64, lse (N,), and the loss's gradients to query (N, D) and to key (N, D), or (0, D) unwanted.
Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def reference(query: Tensor, key: Tensor, bank: Tensor, skip: Tensor | None, options: Options) -> Result:
    """Any device and dtype: matrix products on slices of the bank, with the running maximum of an online softmax."""
    temperature, margin, normalized, fixed_maximum, key_gradient = options
    q = wide(query).contiguous()
    k = key.to(q.dtype).contiguous()
    q_norm, k_norm = norm_of(q), norm_of(k)
    if not normalized:
        q, k = q / q_norm, k / k_norm
    n, _ = q.shape
    similarity = (q * k).sum(dim=1)
    # Finite, so that a query all of whose negatives are skipped gives exp(-inf) = 0 and not NaN.
    maximum = q.new_full((n,), 1 / temperature if fixed_maximum else torch.finfo(q.dtype).min)
    total, weighted = torch.zeros_like(similarity), torch.zeros_like(q)
    rank = torch.zeros_like(similarity, dtype=torch.int64)
    for start, rows in slices(bank, n, q.dtype):
        similarities = masked(q @ rows.T, skip, start)
        rank += (similarities > similarity[:, None]).sum(dim=1)
        logits = similarities.div_(temperature)
        if not fixed_maximum:
            higher = torch.maximum(maximum, logits.amax(dim=1))
            shrink = (maximum - higher).exp()
            maximum, total, weighted = higher, total * shrink, weighted * shrink[:, None]
        weights = logits.sub_(maximum[:, None]).exp_()
        total += weights.sum(dim=1)
        weighted.addmm_(weights, rows)

    positive = (similarity - margin) / temperature
    lse = torch.logaddexp(positive, maximum + total.log())
    loss = (lse - positive).mean()
    excess = ((positive - lse).expm1() / (temperature * n))[:, None]
    dquery = weighted * ((maximum - lse).exp() / (temperature * n))[:, None] + excess * k
    dkey = excess * q if key_gradient else q.new_empty((0, q.shape[1]))
    if not normalized:
        dquery = _through_norm(dquery, q, q_norm)
        dkey = _through_norm(dkey, k, k_norm) if key_gradient else dkey
    return loss, rank, lse, dquery, dkey


def slices(bank: Tensor, n: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The bank's rows in `dtype`, as many at a time as `n` queries may meet, and the number of the first."""
    size = max(1, SLICE_ELEMENTS // n)
    for start in range(0, len(bank), size):
        yield start, bank[start : start + size].to(dtype)


def masked(similarities: Tensor, skip: Tensor | None, start: int) -> Tensor:
    """`similarities` of the bank's rows from `start` on, with -inf where `skip` names the row."""
    if skip is None:
        return similarities
    rows = torch.arange(start, start + similarities.shape[1], device=skip.device)
    return similarities.masked_fill((skip[:, :, None] == rows).any(dim=1), -torch.inf)


def norm_of(x: Tensor) -> Tensor:
    """(N, 1), the lengths of the rows, at least epsilon."""
    return x.norm(dim=1, keepdim=True).clamp_min(NORM_EPSILON)


def _through_norm(gradient: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """The gradient to x of what has `gradient` at `unit = x / norm`, `norm = max(|x|, epsilon)`."""
    along = (gradient * unit).sum(dim=1, keepdim=True) * (norm > NORM_EPSILON)
    return (gradient - unit * along) / norm
