"""The objectives for other loops: supervised contrast, margins, both directions of a bank, mixed samples."""

from __future__ import annotations

import copy

import pytest
import torch
from test_adapters import Net, images
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastmoco.adapters.lightly import NTXentLoss
from fastmoco.adapters.moco import MoCo
from fastmoco.adapters.objectives import MixedBarlowTwinsLoss, SupConLoss, mix_views
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.ops import definitions
from worlds import in_world

TARGETS = torch.tensor([1, 0, 1, -1, 2, 0])


def projections(seed: int, n: int = 6, d: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return first.requires_grad_(), (2 * first.detach() + torch.randn(n, d, generator=generator)).requires_grad_()


@pytest.mark.parametrize("margin", [-0.1, 2.1, float("nan")])
def test_margins_are_from_0_to_2(margin: float) -> None:
    with pytest.raises(ValueError, match="Illegal margin"):
        NTXentLoss(0.3, margin=margin)
    assert NTXentLoss(0.3, margin=2.0).margin == 2.0


def test_margins_are_of_the_positives_within_a_batch_and_against_a_bank() -> None:
    z0, z1 = projections(0)
    expected, _ = definitions.supcon(z0, z1, torch.arange(6), temperature=0.3, margin=0.2)
    torch.testing.assert_close(NTXentLoss(0.3, margin=0.2)(z0, z1), expected)
    criterion = NTXentLoss(0.3, (7, 5), margin=0.2)
    bank = criterion.memory_bank.bank.double()
    query, key = normalize(z0, dim=1), normalize(z1, dim=1)
    expected, _ = definitions.infonce(query, key, bank, temperature=0.3, margin=0.2)
    torch.testing.assert_close(criterion(z0, z1), expected)


def test_both_directions_are_against_the_bank_of_before() -> None:
    # The bank is drawn at random.
    torch.manual_seed(3)
    criterion = NTXentLoss(0.2, (16, 5))
    twice = copy.deepcopy(criterion)
    bank = criterion.memory_bank.bank.double().clone()
    (q0, k1), (q1, k0) = projections(1), projections(2)
    found = criterion.symmetric(q0, k1, q1, k0)
    pairs = [(normalize(q, dim=1), normalize(k, dim=1)) for q, k in ((q0, k1), (q1, k0))]
    expected = sum(definitions.infonce(q, k, bank, temperature=0.2)[0] for q, k in pairs) / 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, q1, retain_graph=True)[0], torch.autograd.grad(expected, q1)[0]
    )
    # Both views' keys are kept.
    kept = torch.cat([k for _, k in pairs]).float()
    torch.testing.assert_close(criterion.memory_bank.bank[:12], kept)
    assert int(criterion.memory_bank.bank_ptr) == 12
    # Two calls poison the second.
    assert abs(((twice(q0, k1) + twice(q1, k0)) / 2 - found).item()) > 1e-3
    with pytest.raises(ValueError, match="for a memory bank"):
        NTXentLoss(0.2).symmetric(q0, k1, q1, k0)


def test_mocos_model_both_ways() -> None:
    torch.manual_seed(0)
    model = MoCo(Net, dim=5, K=17, m=0.9, T=0.2, fused_loss=True, symmetric=True)
    before = copy.deepcopy(model)
    x, y = images(6, 0), images(6, 1)
    loss = model(x, y)
    queue = before.queue.T.double()
    encoders = before.encoder_q, before.encoder_k
    queries, keys = ([normalize(encoder(view), dim=1).double() for view in (x, y)] for encoder in encoders)
    expected = sum(definitions.infonce(queries[i], keys[1 - i], queue, temperature=0.2)[0] for i in (0, 1)) / 2
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.queue[:, :12].T.double(), torch.cat(keys[::-1]), rtol=1e-4, atol=1e-5)
    assert int(model.queue_ptr) == 12
    with pytest.raises(UserError, match="fused_loss=True"):
        MoCo(Net, symmetric=True)


def test_supervised_contrast_is_its_definition() -> None:
    z0, z1 = projections(3)
    expected, _ = definitions.supcon(z0, z1, TARGETS, temperature=0.1)
    torch.testing.assert_close(SupConLoss()(z0, z1, TARGETS), expected)


def _shared(world: World) -> tuple[Tensor, list[Tensor]]:
    net = nn.Linear(5, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(torch.arange(20).view(4, 5).sin())
    own = slice(3 * world.rank, 3 * world.rank + 3) if not world.alone else slice(None)
    z0, z1 = (net(z.detach()[own]) for z in projections(4))
    loss = SupConLoss(0.3, gather_distributed=True)(z0, z1, TARGETS[own])
    return loss.detach(), [g.detach() for g in torch.autograd.grad(loss, list(net.parameters()))]


def test_supervised_contrast_of_two_processes_is_that_of_one() -> None:
    loss, gradients = _shared(World())
    results = in_world(2, _shared)
    for found, _ in results:
        torch.testing.assert_close(found, loss)
    # As DistributedDataParallel takes the mean.
    for place, expected in enumerate(gradients):
        torch.testing.assert_close((results[0][1][place] + results[1][1][place]) / 2, expected)


def test_mixed_samples() -> None:
    torch.manual_seed(5)
    x0, x1 = torch.rand(2, 6, 3, 4, 4)
    mixed, order, share = mix_views(x0, x1)
    assert sorted(order.tolist()) == list(range(6)) and 0 <= float(share) <= 1
    torch.testing.assert_close(mixed, share * x0 + (1 - share) * x1[order])
    (z0, z1), (zm, _) = projections(6, d=9), projections(7, d=9)
    expected = definitions.crosscorr(z0, z1, off_diagonal=0.01) + 0.01 * 2 * definitions.mixed_crosscorr(
        zm, z0, z1, order, float(share)
    )
    found = MixedBarlowTwinsLoss(0.01, 2.0)(z0, z1, zm, order, share.double())
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, [z0, z1, zm]), torch.autograd.grad(expected, [z0, z1, zm]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
