"""Runs of which one process fails, dies, hangs or ends in good order: what all of them say, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from fastmoco.distributed.launch import Launch
from fastmoco.distributed.monitor import HUNG, OTHER_FAILED, Monitor, watched
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from ranks import QUICK, Agreed, Ranks, Scenario, steps, wait_for_ever

HOST = socket.gethostname()
RAISED = 1


def raise_on_rank_1(world: World, monitor: Monitor, folder: Path) -> None:
    steps(world, monitor, folder, 4)
    if world.rank == 1:
        raise FileNotFoundError("no image\nat all")
    steps(world, monitor, folder)


def raise_on_rank_0(world: World, monitor: Monitor, folder: Path) -> None:
    steps(world, monitor, folder, 4)
    if world.rank == 0:
        raise FileNotFoundError("no image\nat all")
    steps(world, monitor, folder)


def raise_alike(world: World, monitor: Monitor, folder: Path) -> None:
    steps(world, monitor, folder, 3)
    # Rank 0 has curves to draw.
    time.sleep(2.0 - world.rank)
    raise UserError("--lr is too high")


def raise_in_good_order(world: World, monitor: Monitor, folder: Path) -> None:
    steps(world, monitor, folder, 3)
    raise Agreed


def mistake_on_rank_1(world: World, monitor: Monitor, folder: Path) -> None:
    steps(world, monitor, folder, 3)
    if world.rank == 1:
        raise UserError("--data is not there")
    steps(world, monitor, folder)


def hang_on_rank_1(world: World, monitor: Monitor, folder: Path) -> None:
    steps(world, monitor, folder, 4)
    if world.rank == 1:
        wait_for_ever()
    steps(world, monitor, folder)


def end_apart(world: World, monitor: Monitor, folder: Path) -> None:
    steps(world, monitor, folder, 3)
    time.sleep((0.0, 0.7, 1.4)[(world.rank + int((folder / "first").read_text())) % 3])


def long_start(world: World, monitor: Monitor, folder: Path) -> None:
    time.sleep(4.0)
    steps(world, monitor, folder, 3)


def long_phase(world: World, monitor: Monitor, folder: Path) -> None:
    steps(world, monitor, folder, 3)
    for _ in range(8):
        time.sleep(0.5)
        if world.rank == 1:
            monitor.alive()


@pytest.mark.parametrize(("scenario", "failing"), [(raise_on_rank_1, 1), (raise_on_rank_0, 0)])
def test_an_exception_of_one_rank_ends_all_with_its_cause(tmp_path: Path, scenario: Scenario, failing: int) -> None:
    ranks = Ranks(tmp_path, 3, scenario)
    ranks.wait_for_step(3)
    pid = ranks.processes[failing].pid
    status = ranks.end()
    assert status == [RAISED if rank == failing else OTHER_FAILED for rank in range(3)]
    expected = (
        f"error: rank {failing} on {HOST} (pid {pid}) failed after step 4: FileNotFoundError: no image; "
        "go on with --resume\n"
    )
    for rank, said in enumerate(ranks.errors()):
        if rank == failing:
            assert "Traceback" in said
        else:
            assert expected in said
            assert "Traceback" not in said


@pytest.mark.parametrize("killed", [0, 2])
def test_a_killed_rank_ends_all_that_are_waiting_for_it(tmp_path: Path, killed: int) -> None:
    ranks = Ranks(tmp_path, 3, steps)
    ranks.wait_for_step(3)
    pid = ranks.signal(killed, signal.SIGKILL)
    status = ranks.end()
    assert status == [-signal.SIGKILL if rank == killed else OTHER_FAILED for rank in range(3)]
    for rank, said in enumerate(ranks.errors()):
        if rank != killed:
            assert f"error: rank {killed} on {HOST} (pid {pid}) ended without a word after step" in said
            assert said.count("error: ") == 1


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_by_the_watchdog(tmp_path: Path, stopped: int) -> None:
    ranks = Ranks(tmp_path, 3, steps, seconds=2.0)
    ranks.wait_for_step(3)
    pid = ranks.signal(stopped, signal.SIGSTOP)
    before = time.monotonic()
    others = [rank for rank in range(3) if rank != stopped]
    for rank in others:
        ranks.processes[rank].join(60)
    took = time.monotonic() - before
    ranks.processes[stopped].kill()
    status = ranks.end()
    assert [status[rank] for rank in others] == [HUNG, HUNG]
    assert 1.5 < took < 60
    for rank in others:
        said = ranks.errors()[rank]
        assert f"rank {stopped} on {HOST} (pid {pid}) was last heard from" in said
        # Where the threads stand. When the first of them ends, what the other waits for may break before it ends too.
        assert "in steps" in said or "in fail" in said, said
    assert any("in steps" in ranks.errors()[rank] for rank in others), ranks.errors()


def test_a_rank_that_hangs_is_shown_where_it_stands(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, hang_on_rank_1, seconds=1.5)
    ranks.wait_for_step(3)
    pid = ranks.processes[1].pid
    assert ranks.end() == [HUNG, HUNG]
    for said in ranks.errors():
        assert "after step 4 (--watchdog)" in said
        assert f"rank 1 on {HOST} (pid {pid}) stands after step 4, in wait_for_ever (ranks.py:" in said
    assert "in wait_for_ever" in ranks.errors()[1].partition("error:")[0]


def test_what_all_raise_alike_is_told_once(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3, raise_alike)
    assert ranks.end() == [RAISED, 2, 2]
    said = ranks.errors()
    assert "UserError: --lr is too high" in said[0]
    assert said[1:] == ["", ""]


def test_a_mistake_that_one_rank_alone_finds_ends_all(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, mistake_on_rank_1)
    assert ranks.end() == [OTHER_FAILED, RAISED]
    assert "failed after step 3: UserError: --data is not there" in ranks.errors()[0]


def test_what_is_agreed_on_is_no_failure(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, raise_in_good_order)
    assert ranks.end() == [RAISED, RAISED]
    assert all("Agreed" in said and "error: " not in said for said in ranks.errors())


def test_what_comes_before_the_first_step_may_take_long(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, long_start, seconds=3.0)
    assert ranks.end() == [0, 0], ranks.errors()


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_may_end_apart(tmp_path: Path, first: int) -> None:
    (tmp_path / "first").write_text(str(first))
    ranks = Ranks(tmp_path, 3, end_apart)
    assert ranks.end() == [0, 0, 0]
    assert ranks.errors() == ["", "", ""]


def test_a_sign_of_life_of_any_rank_is_enough(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, long_phase, seconds=3.0)
    assert ranks.end() == [0, 0], ranks.errors()


def _alone(folder: Path, seconds: float) -> None:
    with (folder / "errors0").open("w") as errors:
        os.dup2(errors.fileno(), 2)
    with watched(World(), Launch("alone"), seconds, **QUICK) as monitor:
        monitor.beat(7)
        wait_for_ever()


def test_a_process_alone_is_watched_too(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_alone, args=(tmp_path, 0.5))
    process.start()
    process.join(60)
    assert process.exitcode == HUNG
    said = (tmp_path / "errors0").read_text()
    assert "nothing got on for" in said
    assert "after step 7" in said
    assert "in wait_for_ever" in said


def test_alone_an_exception_is_left_as_it_is() -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="NCCL"), watched(World(), Launch("alone"), 60.0):
        raise RuntimeError("NCCL error")
    assert time.monotonic() - began < 10
