"""Processes killed, folders lost and disks full in runs of several processes. `make test-system`."""

from __future__ import annotations

import ctypes
import functools
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmoco.data.loader import Batch
from fastmoco.distributed.monitor import OTHER_FAILED
from fastmoco.models.weights import read_weights
from fastmoco.train.trainer import Trainer
from faults import EVERY, STEPS, checkpoints, command, done, losses, step_of
from jobs import Job
from runs import draw_images

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("data"), 48)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that nothing befell."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with Job(out.parent / "job", 2, command(images, out)) as job:
        assert job.end() == [0, 0], job.all_output()
    return out


def assert_same_end(expected: Path, actual: Path) -> None:
    """Weights, queue, optimiser and every step's losses, bit for bit."""
    one, other = (load_file(checkpoints(out)[-1]) for out in (expected, actual))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert [row["step"] for row in losses(actual)] == list(range(1, STEPS + 1))
    assert losses(expected) == losses(actual)


def stopped_while_writing(job: Job, out: Path) -> bool:
    """Whether rank 0, the one that writes, could be stopped while a file of its own was half there."""
    half = f".step-*.tmp-{job.pid(0)}"
    if not any((out / "checkpoints").glob(half)):
        return False
    os.kill(job.pid(0), signal.SIGSTOP)
    # Some threads may go on for a moment.
    time.sleep(0.05)
    if any((out / "checkpoints").glob(half)):
        return True
    os.kill(job.pid(0), signal.SIGCONT)
    return False


def kill_once(job: Job, out: Path, rank: int, *, writing: bool, step: int, delay: float) -> float:
    """Kill a rank, while it, 0, writes a checkpoint or `delay` seconds after `step`; seconds until the others ended."""
    if writing:
        assert rank == 0
        job.wait_until(lambda: stopped_while_writing(job, out))
    else:
        # Not by metrics.jsonl, which still has the rows of a run before.
        job.wait_until(lambda: f"step {step}/{STEPS} " in job.output(0))
        time.sleep(delay)
    killed = job.kill(rank)
    status = job.end(within=30)
    took = time.monotonic() - killed
    assert [s for r, s in enumerate(status) if r != rank] == [OTHER_FAILED] * (job.size - 1), job.all_output()
    for other in range(job.size):
        if other != rank:
            said = job.output(other)
            assert f"error: rank {rank} on " in said
            assert f"(pid {job.pid(rank)}) ended without a word" in said
            assert "Traceback" not in said
    return took


def test_kills_lose_nothing_but_the_steps_since_the_last_checkpoint(
    images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten kill -9, three of rank 0 while it writes a checkpoint, the others of random ranks; and runs that go on with
    as many or others."""
    rng = random.Random(2026)
    # World sizes of each attempt, and which of them are killed while a checkpoint is written.
    plans = {"same": ([2, 2, 2, 2, 2], {1, 3}), "other": ([3, 2, 3, 2, 3], {2})}
    last = {"same": 2, "other": 4}
    log = []
    for name, (sizes, writing) in plans.items():
        out = tmp_path / name
        for attempt, size in enumerate(sizes):
            saved = checkpoints(out)
            with Job(tmp_path / "jobs" / f"{name}{attempt}", size, command(images, out)) as job:
                began = step_of(saved[-1]) if saved else 0
                # Spread over the run, so that it is alive whenever its turn comes.
                step = max(began + 1, attempt * (STEPS - 8) // len(sizes) + rng.randrange(1, 4))
                rank = 0 if attempt in writing else rng.randrange(size)
                took = kill_once(job, out, rank, writing=attempt in writing, step=step, delay=rng.random() * 0.2)
                if saved:
                    assert f"going on from step {began}\n" in job.output(0)
            when = "while saving" if attempt in writing else f"after step {step}"
            halves = len(list((out / "checkpoints").glob(".step-*")))
            log.append(
                f"{name}: rank {rank} of {size}, begun at {began}, {when}; others ended in {took:.1f} s; "
                f"{halves} half-written"
            )
            for path in checkpoints(out):
                assert read_weights(path)[1]["step"] == step_of(path)
            # No more than what was being written when it was killed, and the steps after it.
            newest = step_of(checkpoints(out)[-1]) if checkpoints(out) else 0
            assert done(out) - newest < 2 * EVERY or "is slow" in job.output(0)
        with Job(tmp_path / "jobs" / f"{name}-last", last[name], command(images, out)) as job:
            assert job.end() == [0] * last[name], job.all_output()
    with capsys.disabled():
        print("\nkills:", *log, sep="\n  ")
    assert_same_end(whole, tmp_path / "same")
    expected, actual = losses(whole), losses(tmp_path / "other")
    assert [row["step"] for row in actual] == list(range(1, STEPS + 1))
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(expected, actual, strict=True))
    with capsys.disabled():
        print(f"  losses with other numbers of processes differ by at most {apart:.2g}")
    assert apart < 1e-3


def at_step(number: int, disturb: Callable[[list[Batch]], None]) -> None:
    """Have `disturb` see the micro-batches of this process's step `number` before it is made."""
    step, count = Trainer.step, 0

    def disturbed(self: Trainer, batches: Iterable[Batch], lr: float) -> None:
        nonlocal count
        count += 1
        ready = list(batches)
        if count == number:
            disturb(ready)
        step(self, ready, lr)

    Trainer.step = disturbed  # type: ignore[method-assign]


def fail_on_rank_2(rank: int) -> None:
    def fail(batches: list[Batch]) -> None:
        raise MemoryError("no 16 GB are left")

    if rank == 2:
        at_step(7, fail)


def test_an_unforeseen_failure_of_one_rank_is_told_by_all(images: Path, tmp_path: Path) -> None:
    with Job(tmp_path / "job", 3, command(images, tmp_path / "run"), prepare=fail_on_rank_2) as job:
        job.wait_until(lambda: f"step 6/{STEPS} " in job.output(0))
        began = time.monotonic()
        assert job.end() == [OTHER_FAILED, OTHER_FAILED, 1]
        assert time.monotonic() - began < 30
        for rank in (0, 1):
            who = f"rank 2 on {socket.gethostname()} (pid {job.pid(2)})"
            assert f"error: {who} failed after step 6: MemoryError: no 16 GB are left; " in job.output(rank)
            assert "Traceback" not in job.output(rank)


def in_mounts_of_its_own(rank: int) -> None:
    """What is mounted for this process from here on, no other sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts = 0x20000
    if libc.unshare(new_mounts) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def test_a_folder_lost_on_one_rank_is_told_with_the_rank(
    images: Path, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    # Where mounting is not permitted, there is nothing to try.
    mounted("40k")
    with Job(tmp_path / "job", 2, command(images, tmp_path / "run"), prepare=in_mounts_of_its_own) as job:
        job.wait_until(lambda: f"step 6/{STEPS} " in job.output(0))
        inside = ["nsenter", "--target", str(job.pid(1)), "--mount"]
        subprocess.run([*inside, "mount", "-t", "tmpfs", "none", str(images)], check=True)
        began = time.monotonic()
        assert job.end() == [2, 2], job.all_output()
        assert time.monotonic() - began < 30
        assert f"rank 1 on {socket.gethostname()}: " in job.output(0)
        assert str(images) in job.output(0)
        assert "saved " in job.output(0)
        assert "Traceback" not in job.all_output()
    with Job(tmp_path / "again", 2, command(images, tmp_path / "run")) as job:
        assert job.end() == [0, 0], job.all_output()


def poison_rank_1(rank: int) -> None:
    def poison(batches: list[Batch]) -> None:
        for batch in batches:
            batch.q.fill_(float("nan"))

    if rank == 1:
        at_step(7, poison)


def test_nan_on_one_rank_stops_all_at_the_same_step(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # The metrics are read at step 10; what was computed at step 7 is found there, and nothing was updated since.
    args = command(images, out, "--log-every", "10", "--checkpoint-every", "5")
    with Job(tmp_path / "job", 2, args, prepare=poison_rank_1) as job:
        assert job.end() == [2, 2], job.all_output()
        assert "error: step 7: " in job.output(0)
        assert "is not finite" in job.output(0)
        assert "step-000000005.safetensors" in job.output(0)
        assert "Traceback" not in job.all_output()
    assert [step_of(path) for path in checkpoints(out)] == [5]
    tensors = load_file(checkpoints(out)[0])
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values() if value.is_floating_point())


def test_a_disk_full_or_read_only_for_a_while_changes_nothing(
    images: Path, whole: Path, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("600M")
    out = disk / "run"
    with Job(tmp_path / "job", 2, command(images, out, "--max-failed-saves", "100")) as job:
        job.wait_until(lambda: bool(checkpoints(out)))
        filler = disk / "filler"
        subprocess.run(["sh", "-c", f"cat /dev/zero > {filler}"], capture_output=True)
        job.wait_until(lambda: "training goes on to the next checkpoint" in job.output(0))
        filler.unlink()
        assert "safetensors could not be written: [Errno 28] No space left" in job.output(0)
        folder = str(out / "checkpoints")
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        try:
            # Not while a file in it is being written.
            job.wait_until(
                lambda: subprocess.run(["mount", "-o", "remount,ro,bind", folder], capture_output=True).returncode == 0
            )
            job.wait_until(lambda: "Read-only file system" in job.output(0))
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
        assert job.end() == [0, 0], job.all_output()
    assert_same_end(whole, out)


def on_a_slow_disk(rank: int, folder: str) -> None:
    """Every file below `folder` takes a while to be brought to the disk."""
    fsync = os.fsync

    def slow(file: int) -> None:
        if folder in os.readlink(f"/proc/self/fd/{file}"):
            time.sleep(3)
        fsync(file)

    os.fsync = slow


def test_a_slow_disk_costs_checkpoints_and_nothing_else(images: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    prepare = functools.partial(on_a_slow_disk, folder="/checkpoints")
    args = command(images, out, "--checkpoint-every", "2", "--max-failed-saves", "100")
    with Job(tmp_path / "job", 2, args, prepare=prepare) as job:
        assert job.end() == [0, 0], job.all_output()
        assert "is still being written after" in job.output(0)
    assert_same_end(whole, out)
