"""InfoNCE of queries against their keys and a bank of negatives (van den Oord 2018; He et al. 2020, eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco.ops import dispatch
from fastmoco.ops.precision import no_autocast, wide


def infonce(
    query: Tensor, key: Tensor, bank: Tensor, *, temperature: float, implementation: str | None = None
) -> Tensor:
    """Mean over the batch of `-log(exp(q.k/t) / (exp(q.k/t) + sum_j exp(q.bank_j/t)))`, a 0-d tensor.

    `query` and `key` are (N, D), `bank` is (K, D), all of unit length, of any floating dtype; the arithmetic and the
    result are float32, or float64 for float64 inputs. Gradients reach `query` and `key`; the bank has none.

    Raises ValueError for shapes that do not fit or a temperature that is not above 0.
    """
    if query.ndim != 2 or query.shape != key.shape or bank.ndim != 2 or bank.shape[1] != query.shape[1]:
        raise ValueError(
            f"infonce: query and key must be (N, D) and bank (K, D), "
            f"not {tuple(query.shape)}, {tuple(key.shape)} and {tuple(bank.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"infonce: temperature must be above 0, not {temperature}")
    with no_autocast(query):
        run = dispatch.pick("infonce", query, implementation)
        return run(wide(query), wide(key), wide(bank.detach()), temperature)


def reference(query: Tensor, key: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """The definition, written out: logits of the positive beside those of every negative."""
    positive = (query * key).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, query @ bank.T], dim=1) / temperature
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()


dispatch.register("infonce", "reference", reference)
