"""The projector: views together are views one after the other."""

from __future__ import annotations

import copy

import torch

from fastmoco.models.projector import Projector


def test_views_together_give_what_they_give_one_by_one() -> None:
    torch.manual_seed(2)
    together = Projector(6, 10).double()
    apart = copy.deepcopy(together)
    views = [torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (5, 3, 7)]
    twins = [view.detach().clone().requires_grad_() for view in views]
    projections = together(*views)
    singles = [apart(twin)[0] for twin in twins]
    upstream = [torch.randn_like(p) for p in projections]
    for outputs in (projections, singles):
        torch.autograd.backward(outputs, upstream)
    for a, b in zip([*projections, *(v.grad for v in views)], [*singles, *(t.grad for t in twins)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for (name, a), b in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12, msg=name)
    # BatchNorm saw each view as a batch of its own.
    for (name, a), b in zip(together.named_buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
