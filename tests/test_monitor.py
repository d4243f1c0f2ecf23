"""Runs of which one process fails, dies, hangs or ends in good order: what all of them say, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastmoco.distributed.launch import Launch, joined
from fastmoco.distributed.monitor import HUNG, OTHER_FAILED, Monitor, watched
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from worlds import free_port

HOST = socket.gethostname()
QUICK: dict[str, float] = {"interval": 0.1, "grace": 0.5, "patience": 3.0}
RAISED = 1
Scenario = Callable[[World, Monitor, Path], None]


class Agreed(Exception):
    """What all ranks raise in good order."""


class Ranks:
    """`size` processes that run one scenario in a world of theirs, each with its error output in a file."""

    def __init__(self, folder: Path, size: int, scenario: Scenario, seconds: float = 60.0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["worlds", "fastmoco.train.trainer"])
        self.folder = folder
        self.began = time.monotonic()
        port = free_port()
        self.processes = [
            context.Process(target=_run, args=(launch, folder, scenario, seconds))
            for launch in (Launch("test", rank, size, rank, size, port=port) for rank in range(size))
        ]
        for process in self.processes:
            process.start()

    def wait_for_step(self, step: int) -> None:
        """Until rank 0 has done `step` steps."""
        while not (self.folder / f"step{step}").exists():
            assert self.processes[0].is_alive(), self.errors()
            time.sleep(0.01)

    def end(self, within: float = 60.0) -> list[int | None]:
        """The exit statuses by rank, once all have ended; AssertionError where one has not `within` seconds."""
        until = time.monotonic() + within
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        running = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not running, f"ranks {running} did not end:\n{self.errors()}"
        return [process.exitcode for process in self.processes]

    def errors(self) -> list[str]:
        """What each rank printed."""
        return [(self.folder / f"errors{rank}").read_text() for rank in range(len(self.processes))]

    def signal(self, rank: int, number: int) -> int:
        """Send a signal to one of them; return its pid."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)
        return pid


def _run(launch: Launch, folder: Path, scenario: Scenario, seconds: float) -> None:
    torch.set_num_threads(1)
    with (folder / f"errors{launch.rank}").open("w") as errors:
        os.dup2(errors.fileno(), 2)
    with joined("cpu", launch=launch) as world, watched(world, launch, seconds, orderly=(Agreed,), **QUICK) as monitor:
        scenario(world, monitor, folder)


def steps(world: World, monitor: Monitor, folder: Path, until: int = 1_000_000) -> None:
    """Steps as of training, of a hundredth of a second."""
    for step in range(1, until + 1):
        dist.all_reduce(torch.ones(3), group=world.group)
        monitor.beat(step)
        if world.first and step <= 3:
            (folder / f"step{step}").touch()
        time.sleep(0.01)


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


def wait_for_ever() -> None:
    time.sleep(1000)


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
        # Where the threads stand.
        assert "in steps" in said, said


def test_a_rank_that_hangs_is_shown_where_it_stands(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, hang_on_rank_1, seconds=1.5)
    ranks.wait_for_step(3)
    pid = ranks.processes[1].pid
    assert ranks.end() == [HUNG, HUNG]
    for said in ranks.errors():
        assert "after step 4 (--watchdog)" in said
        assert f"rank 1 on {HOST} (pid {pid}) stands after step 4, in wait_for_ever (test_monitor.py:" in said
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
