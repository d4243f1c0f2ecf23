"""The objective over several processes is that over one: losses, keys, gradients and statistics, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.distributed.collectives import start_sum
from fastmoco.distributed.exchange import Exchange, draw_order
from fastmoco.distributed.world import World
from fastmoco.train.config import LossConfig, ModelConfig
from fastmoco.train.objective import MomentumContrast
from parity import LOSS, assert_states_close
from runs import NARROW
from worlds import in_world

# Two, three and four processes have equal parts of it.
BATCH, SIDE = 12, 32
TOLERANCE = 1e-10
CASES = pytest.mark.parametrize(
    ("method", "size"),
    [
        ("moco", 2),
        *((method, 2) for method in ("mse", "barlow")),
        *(pytest.param(method, size, marks=pytest.mark.system) for method in ("mse", "barlow") for size in (3, 4)),
    ],
)


def objective(
    world: World,
    method: str,
    norm: str,
    key_shuffle: str = "none",
    groups: int = 1,
    correlation: str = "global",
    arch: str = NARROW,
) -> MomentumContrast:
    """Both encoders with weights and statistics of their own, so that no part of a gradient is zero."""
    module = MomentumContrast(
        ModelConfig(arch=arch, dim=16, zero_init_residual=False, norm=norm, norm_groups=groups),  # type: ignore[arg-type]
        LossConfig(
            method=method,  # type: ignore[arg-type]
            grids=(4, 4, 2, 2),
            stage_weight=0.5,
            projector_width=12,
            barlow_correlation=correlation,  # type: ignore[arg-type]
            key_shuffle=key_shuffle,  # type: ignore[arg-type]
        ),
        # Of a seed with which no projector has all its ReLUs open: gradients of biases before them would be zero.
        seed=6,
        world=world,
    ).double()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if (name.startswith("key.") and name.endswith("weight")) or ".running_" in name:
                value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator, dtype=torch.float64))
    return module


def views(rows: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    # Half precision, as the loader gives them; each image of another brightness, so that no two are alike.
    q = torch.rand(rows, 3, SIDE, SIDE, generator=generator) * torch.linspace(0.2, 1, rows).view(-1, 1, 1, 1)
    k = 0.8 * q + 0.2 * torch.rand(rows, 3, SIDE, SIDE, generator=generator)
    bank = torch.nn.functional.normalize(torch.randn(50, 16, generator=generator, dtype=torch.float64), dim=1)
    q, k = (view.half().to(memory_format=torch.channels_last) for view in (q, k))
    return q.double(), k, bank


def step(world: World, method: str, norm: str, key_shuffle: str) -> dict[str, Tensor]:
    """The micro-batch's losses, gradients and keys, and the statistics afterwards, as one process would have them."""
    module = objective(world, method, norm, key_shuffle)
    q, k, bank = views()
    part = BATCH // world.size
    own = slice(world.rank * part, (world.rank + 1) * part)
    order = draw_order(0, 0, world.rank, part) if key_shuffle != "none" else None
    output = module(q[own], k[own], bank, order)
    torch.stack(list(output.losses.values())).sum().backward()
    found = {f"loss {name}": value.detach() for name, value in output.losses.items()}
    found |= {f"gradient {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    for value in found.values():
        work = start_sum(world, value, kind="test")
        if work is not None:
            work.wait()
        value /= world.size
    return (
        found
        | {f"buffer {name}": value for name, value in module.named_buffers() if ".running_" in name}
        | {f"rows {name}": getattr(output, name).double() for name in ("key", "query", "rank")}
    )


def assert_one_process(size: int, *arguments: str) -> None:
    expected = step(World(), *arguments)
    results = in_world(size, step, *arguments)
    rows = {name: torch.cat([r[name] for r in results]) for name in results[0] if name.startswith("rows ")}
    for result in results:
        assert_states_close(result | rows, expected, TOLERANCE, f"{size} processes, {arguments}")


@CASES
def test_with_frozen_statistics_and_keys_shuffled_over_all(method: str, size: int) -> None:
    """A key's place among the others makes no difference to it: it is exactly that without shuffling."""
    expected = step(World(), method, "frozen", "none")
    if size == 2:
        assert_states_close(step(World(), method, "frozen", "global"), expected, TOLERANCE, "one process")
    results = in_world(size, step, method, "frozen", "global")
    rows = {name: torch.cat([r[name] for r in results]) for name in results[0] if name.startswith("rows ")}
    for result in results:
        assert_states_close(result | rows, expected, TOLERANCE, f"{size} processes, {method}")


@CASES
def test_with_synchronised_statistics(method: str, size: int) -> None:
    assert_one_process(size, method, "sync", "none")


def test_with_synchronised_statistics_and_keys_shuffled_over_all() -> None:
    assert_one_process(3, "mse", "sync", "global")


def _only_the_embedding_unshuffled(world: World, method: str) -> dict[str, Tensor]:
    bring_back = Exchange.bring_back

    def mistaken(self: Exchange, *features: Tensor) -> list[Tensor]:
        return [*bring_back(self, features[0]), *features[1:]]

    Exchange.bring_back = mistaken  # type: ignore[method-assign]
    try:
        return step(world, method, "frozen", "global")
    finally:
        Exchange.bring_back = bring_back  # type: ignore[method-assign]


@pytest.mark.parametrize("method", ["mse", "barlow"])
def test_stage_features_left_shuffled_are_noticed(method: str) -> None:
    expected = step(World(), method, "frozen", "none")
    for result in [
        _only_the_embedding_unshuffled(World(), method),
        *in_world(2, _only_the_embedding_unshuffled, method),
    ]:
        assert torch.allclose(result["loss infonce"], expected["loss infonce"], rtol=1e-10)
        for stage in range(1, 5):
            loss, right = result[f"loss stage{stage}"], expected[f"loss stage{stage}"]
            assert abs(loss - right) > 1e-3 * right


def _in_bfloat16(world: World, norm: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    module = objective(world, "barlow", norm, "global", arch="resnet18").float().to(memory_format=torch.channels_last)
    q, k, bank = views()
    part = BATCH // world.size
    own = slice(world.rank * part, (world.rank + 1) * part)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(q[own].bfloat16(), k[own], bank.float(), draw_order(0, 0, world.rank, part))
    torch.stack(list(output.losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)
    return {name: value.detach().double() for name, value in output.losses.items()}, dict(world.sent)


def test_in_bfloat16_all_is_sent_as_narrow_as_it_is() -> None:
    # Over batches of so few images normalisation makes much of every rounding, and how much is the processor's doing:
    # the losses are compared with statistics that stay, what is sent and the gradients with those of the batch too.
    # Of as many channels as there are in earnest: of fewer, roundings even out less.
    q, k, bank = views()
    expected = objective(World(), "barlow", "frozen", arch="resnet18")(q, k, bank, None).losses
    results = in_world(2, _in_bfloat16, "frozen")
    for name in ("infonce", "stage1", "stage2", "stage3", "stage4"):
        mean = sum(losses[name] for losses, _ in results) / 2
        assert mean.item() == pytest.approx(expected[name].item(), rel=LOSS[torch.bfloat16]), name
    part = BATCH // 2
    away = part // 2
    for _, sent in [*results, *in_world(2, _in_bfloat16, "sync")]:
        assert sent["shuffle"] == away * 3 * SIDE * SIDE * 2
        assert sent["unshuffle"] == away * (16 + 64 + 128 + 256 + 512) * 4
        assert sent["projections"] == part * 2 * 4 * 12 * 2


def _of_its_own_images(world: World) -> list[float]:
    q, k, bank = views()
    part = BATCH // world.size
    own = slice(world.rank * part, (world.rank + 1) * part)
    losses = [
        objective(where, "barlow", "frozen", correlation="per_rank")(q[own], k[own], bank).losses["stage3"].item()
        for where in (world, World())
    ]
    assert "projections" not in world.sent
    return losses


def test_a_correlation_per_rank_is_of_its_own_images() -> None:
    results = in_world(2, _of_its_own_images)
    assert all(mine == alone for mine, alone in results) and results[0] != results[1]


def test_locally_shuffled_groups_mix_the_images() -> None:
    """The statistics of a key's group are then those of other images than its query's."""
    q, k, bank = views()
    order = draw_order(1, 2, 0, BATCH)

    def keys(key_shuffle: str, groups: int, images: Tensor, order: Tensor | None) -> Any:
        return objective(World(), "mse", "batch", key_shuffle, groups)(q, images, bank, order)

    shuffled = keys("local", 4, k, order)
    by_hand = keys("none", 4, k[order], None)
    assert torch.allclose(shuffled.key[order], by_hand.key, rtol=0, atol=1e-12)
    assert not torch.allclose(shuffled.key, keys("none", 4, k, None).key, rtol=0, atol=1e-3)
    # In one group the order makes no difference.
    whole = keys("none", 1, k, None)
    one = keys("local", 1, k, order)
    assert torch.allclose(one.key, whole.key, rtol=0, atol=1e-12)
    for name, loss in whole.losses.items():
        assert torch.allclose(one.losses[name], loss, rtol=1e-11)
