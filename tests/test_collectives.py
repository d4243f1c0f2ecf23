"""What processes send each other arrives, with the right gradients, and is counted."""

from __future__ import annotations

import torch

from fastmoco.distributed.collectives import gather, gather_for_shared_loss, start_gather, start_sum
from fastmoco.distributed.launch import Launch, find_launch
from fastmoco.distributed.world import World
from worlds import in_world


def _gathered(world: World) -> tuple[list[float], int, list[float]]:
    rows = torch.arange(6.0).view(3, 2) + 10 * world.rank
    out = gather(world, rows, kind="keys")
    later = start_gather(world, rows, kind="keys").wait()
    assert torch.equal(out, later)
    total = rows[:1].clone()
    start_sum(world, total, kind="losses").wait()
    return out.flatten().tolist(), world.sent["keys"], total.flatten().tolist()


def test_rows_come_in_the_order_of_ranks_and_are_counted() -> None:
    results = in_world(3, _gathered)
    for out, sent, total in results:
        assert out == [float(10 * rank + i) for rank in range(3) for i in range(6)]
        assert sent == 2 * 2 * 3 * 2 * 4
        assert total == [30.0, 33.0]


def _gradient(world: World) -> tuple[float, torch.Tensor]:
    rows = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    part = 12 // world.size
    own = rows[world.rank * part : (world.rank + 1) * part].requires_grad_()
    all_rows = gather_for_shared_loss(world, own, kind="projections")
    loss = (all_rows.T @ all_rows).square().sum().sqrt()
    loss.backward()
    assert own.grad is not None
    return loss.item(), own.grad / world.size


def test_the_gradient_of_a_shared_loss_is_that_of_one_process() -> None:
    ((loss, expected),) = [_gradient(World())]
    for size in (2, 3):
        results = in_world(size, _gradient)
        assert all(abs(value - loss) < 1e-12 for value, _ in results)
        assert torch.allclose(torch.cat([gradient for _, gradient in results]), expected, rtol=1e-12, atol=1e-12)


def test_in_a_world_of_one_nothing_is_sent() -> None:
    world = World()
    rows = torch.ones(2, 3, requires_grad=True)
    assert gather(world, rows, kind="keys") is rows and gather_for_shared_loss(world, rows, kind="keys") is rows
    assert start_sum(world, rows, kind="losses") is None and not world.sent


def test_launchers_are_told_apart() -> None:
    meeting = {"MASTER_ADDR": "n0", "MASTER_PORT": "1234"}
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | meeting
    assert find_launch(torchrun) == Launch("torchrun", 3, 4, 1, 2, "n0", 1234)
    srun = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"} | meeting
    assert (find_launch(srun).by, find_launch(srun).rank, find_launch(srun).size) == ("srun", 1, 2)
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
    assert find_launch(batch_script) == find_launch({}) == Launch("alone")
