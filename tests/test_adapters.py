"""fastmoco.adapters.solo and .moco, each against what its library's code says in plain torch."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fastmoco.adapters import solo
from fastmoco.adapters.between import gather
from fastmoco.adapters.moco import MoCo
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from worlds import in_world


class Net(nn.Module):
    """A network with a last layer `fc` and a BatchNorm, as torchvision's have."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.norm(self.conv(x)).relu().mean(dim=(2, 3)))
        return out


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_solos_contrastive_loss() -> None:
    query, key = (normalize(torch.randn(7, 12), dim=1).requires_grad_() for _ in range(2))
    queue = normalize(torch.randn(12, 33), dim=0)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], dim=1) / 0.1
    expected = cross_entropy(logits, torch.zeros(7, dtype=torch.long))
    found = solo.mocov2plus_loss_func(query, key, queue)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    wanted, own = (torch.autograd.grad(loss, (query, key)) for loss in (expected, found))
    torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("queue", [(8, 16), (4,), (2, 4, 16)])
def test_a_queue_of_another_shape_is_told_as_solo_has_it(queue: tuple[int, ...]) -> None:
    said = rf"query and key must be \(N, D\) and queue \(D, K\), not \(8, 4\), \(8, 4\) and {re.escape(str(queue))}"
    with pytest.raises(UserError, match=said):
        solo.mocov2plus_loss_func(torch.ones(8, 4), torch.ones(8, 4), torch.ones(queue), 0.2)


def _plain_barlow(z1: Tensor, z2: Tensor, lamb: float, scale: float) -> Tensor:
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z1, z2))
    c = a.T @ b / len(a)
    weights = torch.full_like(c, lamb).fill_diagonal_(1.0)
    return scale * ((c - torch.eye(len(c), dtype=c.dtype)).square() * weights).sum()


def test_solos_barlow_loss() -> None:
    z1, z2 = (torch.randn(9, 14, dtype=torch.float64).requires_grad_() for _ in range(2))
    expected, found = _plain_barlow(z1, z2, 5e-3, 0.025), solo.barlow_loss_func(z1, z2)
    torch.testing.assert_close(found, expected)
    wanted, own = (torch.autograd.grad(loss, (z1, z2)) for loss in (expected, found))
    torch.testing.assert_close(own, wanted)


def _barlow_of_two(world: World, plain: bool) -> Tensor:
    z1, z2 = (torch.randn(9, 14, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    z1.requires_grad_()
    solo.barlow_loss_func(z1, z2, plain_all_reduce=plain).backward()
    assert z1.grad is not None
    return z1.grad


def test_of_processes_with_the_same_images_the_gradient_is_that_of_one() -> None:
    """And solo-learn's, whose all_reduce autograd does not see, half of it for two."""
    z1, z2 = (torch.randn(9, 14, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    z1.requires_grad_()
    (expected,) = torch.autograd.grad(_plain_barlow(z1, z2, 5e-3, 0.025), z1)
    for plain, factor in ((False, 1.0), (True, 0.5)):
        for found in in_world(2, _barlow_of_two, plain):
            torch.testing.assert_close(found, factor * expected, rtol=1e-5, atol=1e-7)


def _gathered(world: World) -> tuple[Tensor, Tensor]:
    x = (torch.arange(6.0).view(2, 3) + 10 * world.rank).requires_grad_()
    beside = torch.zeros(2, 6, requires_grad=True)
    everyone = solo.gather(x, dim=1)
    # Losses that differ: what each wants of this one's columns is added up, and of what is not gathered is not.
    both = everyone + beside
    ((world.rank + 1) * both.square()).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(beside.grad, 2 * (world.rank + 1) * everyone.detach())
    return everyone.detach(), x.grad


def _shared(world: World) -> bool:
    """Whether a gradient that two are given reaches the other as it was."""
    x, beside = torch.ones(2, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    # Made before the gathering, so that its gradient is passed on after.
    other = beside * 1.0
    weights = torch.full((4, 3), world.rank + 1.0)
    ((gather(x) + other) * weights).sum().backward()
    return beside.grad is not None and torch.equal(beside.grad, weights)


def test_what_is_gathered_has_the_gradients_of_all() -> None:
    parts = [torch.arange(6.0).view(2, 3) + 10 * rank for rank in range(2)]
    for rank, (everyone, gradient) in enumerate(in_world(2, _gathered)):
        assert torch.equal(everyone, torch.cat(parts, dim=1))
        assert torch.equal(gradient, 2 * (1 + 2) * parts[rank])


def test_gathering_leaves_gradients_of_others_alone() -> None:
    assert all(in_world(2, _shared))


def test_solos_moving_average() -> None:
    online, momentum = Net(4), Net(4)
    solo.initialize_momentum_params(online, momentum)
    assert all(torch.equal(a, b) for a, b in zip(online.parameters(), momentum.parameters(), strict=True))
    assert not any(p.requires_grad for p in momentum.parameters())
    before = copy.deepcopy(momentum)
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(1.0)
    updater = solo.MomentumUpdater(0.9, 1.0)
    updater.update_tau(25, 100)
    assert updater.cur_tau == pytest.approx(1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2)
    updater.update(online, momentum)
    for new, old in zip(momentum.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old + (1 - updater.cur_tau), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="base_tau <= final_tau"):
        solo.MomentumUpdater(0.9, 0.8)


@pytest.mark.parametrize("mlp", [False, True])
def test_mocos_model_step_by_step(mlp: bool) -> None:
    torch.manual_seed(0)
    model = MoCo(Net, dim=5, K=13, m=0.9, T=0.2, mlp=mlp)
    assert model.queue.shape == (5, 13) and not any(p.requires_grad for p in model.encoder_k.parameters())
    torch.testing.assert_close(model.queue.norm(dim=0), torch.ones(13))
    names = {"encoder_q.fc.2.weight", "encoder_k.fc.0.bias"} if mlp else {"encoder_q.fc.weight", "encoder_k.fc.bias"}
    assert names | {"queue", "queue_ptr"} <= set(model.state_dict())
    fused = MoCo(Net, dim=5, K=13, m=0.9, T=0.2, mlp=mlp, fused_loss=True)
    fused.load_state_dict(model.state_dict())
    with torch.no_grad():
        for one, other in zip(model.encoder_q.parameters(), fused.encoder_q.parameters(), strict=True):
            one.add_(0.1)
            other.add_(0.1)
    for step in range(3):
        before = copy.deepcopy(model)
        logits, labels = model(images(6, step), images(6, 10 + step))
        loss = cross_entropy(logits, labels)
        loss.backward()
        other_loss = fused(images(6, step), images(6, 10 + step))
        other_loss.backward()
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for k, q, new in zip(
                before.encoder_k.parameters(), before.encoder_q.parameters(), model.encoder_k.parameters(), strict=True
            ):
                torch.testing.assert_close(new, 0.9 * k + 0.1 * q, rtol=0, atol=1e-6)
                k.copy_(new)
            query = normalize(before.encoder_q(images(6, step)), dim=1)
            # BatchNorm's statistics are those of the batch in any order.
            key = normalize(before.encoder_k(images(6, 10 + step)), dim=1)
            expected = torch.cat([(query * key).sum(1, keepdim=True), query @ before.queue], dim=1) / 0.2
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert labels.dtype == torch.long and not labels.any()
        place = [(6 * step + i) % 13 for i in range(6)]
        torch.testing.assert_close(model.queue[:, place].T, key, rtol=1e-4, atol=1e-5)
        assert int(model.queue_ptr) == 6 * (step + 1) % 13
        for (name, one), two in zip(model.named_parameters(), fused.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(fused.queue, model.queue)


def _moco_of_two(world: World) -> dict[str, Any]:
    torch.manual_seed(0)
    model = MoCo(Net, dim=5, K=13)
    logits, _ = model(images(4, world.rank), images(4, 10 + world.rank))
    return {"logits": logits.detach(), "queue": model.queue, "pointer": int(model.queue_ptr)}


def test_mocos_queue_holds_the_keys_of_all_processes() -> None:
    one, other = in_world(2, _moco_of_two)
    assert torch.equal(one["queue"], other["queue"]) and one["pointer"] == other["pointer"] == 8
    # Each process's first logit is of its own image's key, which came back to it.
    torch.manual_seed(0)
    model = MoCo(Net, dim=5, K=13)
    for rank, found in enumerate((one, other)):
        query = normalize(model.encoder_q(images(4, rank)), dim=1)
        keys = found["queue"][:, 4 * rank : 4 * rank + 4].T
        torch.testing.assert_close(found["logits"][:, 0], (query * keys).sum(1) / 0.07, rtol=1e-4, atol=1e-4)
