"""Runs killed without warning, full disks and Ctrl-C, caused for real. `make test-system`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmoco.data.dali import dali_installed
from fastmoco.train.metrics import read_rows
from jobs import Job
from runs import draw_images

pytestmark = pytest.mark.system
STEPS = 60
KILLS, KILLS_WHILE_WRITING = 10, 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("data"), 40)


def command(images: Path, out: Path, loader: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "fastmoco.cli", *arguments(images, out, loader, *more)]


def arguments(images: Path, out: Path, loader: str, *more: str) -> list[str]:
    return [
        "pretrain", "histology-barlow-small", "--data", str(images),
        "--out", str(out), "--resume", "--loader", loader, "--arch", "resnet18", "--size", "32", "--dim", "32",
        "--batch-size", "4", "--queue-size", "31", "--projector-width", "64", "--steps", str(STEPS),
        "--log-every", "3", "--checkpoint-every", "5", "--workers", "1", *more,
    ]  # fmt: skip


def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


@contextmanager
def started(args: list[str], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    # In a session of its own, so that a signal to it and its workers does not reach the tests.
    process = subprocess.Popen(
        args, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(args: list[str], tmp_path: Path) -> str:
    done = subprocess.run(args, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(out: Path) -> int:
    return len(read_rows(out / "metrics.jsonl"))


def last_checkpoint(out: Path) -> int:
    paths = sorted((out / "checkpoints").glob("step-*.safetensors"))
    return int(paths[-1].stem.removeprefix("step-")) if paths else 0


def kill(job: Job) -> None:
    job.kill(0)
    job.end(within=30)


def kill_while_writing(job: Job, out: Path, done: int) -> bool:
    """Kill -9 while a temporary file of a checkpoint after step `done` lies there; False if the run ended first."""
    folder = out / "checkpoints"
    while job.processes[0].is_alive():
        if any(done < int(path.name[6:15]) < STEPS for path in folder.glob(".step-*.tmp-*")):
            kill(job)
            return True
        time.sleep(0.0005)
    return False


def kill_at(job: Job, out: Path, step: int, delay: float) -> None:
    """Kill -9 `delay` seconds after the metrics reach `step`."""
    job.wait_until(lambda: rows(out) >= step)
    time.sleep(delay)
    kill(job)


@pytest.mark.parametrize(
    "loader", ["pillow", pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI"))]
)
def test_ten_kills_change_nothing(
    images: Path, tmp_path: Path, loader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kill -9 at random moments, some while a checkpoint is written; the end is an uninterrupted run's, bit for bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(command(images, whole, loader), tmp_path)
    rng = random.Random(2024)
    # Spread over the run, each at a random step of its tenth, so that the run is alive whenever its turn comes.
    turns = ["write"] * KILLS_WHILE_WRITING + ["step"] * (KILLS - KILLS_WHILE_WRITING)
    rng.shuffle(turns)
    log = []
    for number, turn in enumerate(turns):
        done = last_checkpoint(broken)
        with Job(tmp_path / f"job{number}", 1, arguments(images, broken, loader), cache=tmp_path / "cache") as job:
            if turn == "write":
                assert kill_while_writing(job, broken, done), job.all_output()
            else:
                target = max(done + 1, 1 + number * (STEPS - 20) // KILLS + rng.randrange(4))
                kill_at(job, broken, target, rng.random() * 0.2)
        leftovers = len(list((broken / "checkpoints").glob(".step-*")))
        log.append(f"{turn}: resumed at {done}, killed at {rows(broken)} or later, half-written files {leftovers}")
        if turn == "write":
            assert leftovers, "killed after the rename, not during the write"
    with capsys.disabled():
        print(f"\nkills with {loader}:", *log, sep="\n  ")
    assert last_checkpoint(broken) < STEPS
    run(command(images, broken, loader), tmp_path)
    expected, actual = (load_file(out / "checkpoints" / f"step-{STEPS:09d}.safetensors") for out in (whole, broken))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    timed = {"pairs_per_s", "data_wait"}
    tables = [
        [{k: v for k, v in row.items() if k not in timed} for row in read_rows(out / "metrics.jsonl")]
        for out in (whole, broken)
    ]
    assert [row["step"] for row in tables[0]] == list(range(1, STEPS + 1))
    assert tables[0] == tables[1]
    assert not list((broken / "checkpoints").glob(".step-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_ctrl_c_saves_first(images: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    with started(command(images, out, "pillow", "--checkpoint-every", "1000"), tmp_path) as process:
        while rows(out) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        # To the whole group, workers included, as a terminal does.
        os.killpg(process.pid, number)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert "saved" in output
    assert "Traceback" not in output
    assert 3 <= last_checkpoint(out) < STEPS
    assert last_checkpoint(out) == rows(out)


def test_a_full_disk_is_warned_of_and_after_the_stated_number_ends_the_run_with_the_last_checkpoint(
    images: Path, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    # Room for two checkpoints of this model and their metrics, not for the third before the first is removed.
    disk = mounted("330M")
    # So many steps between them that one is written before the next is due, or is missed, on a busy machine too.
    args = command(images, disk / "run", "pillow", "--keep-checkpoints", "5", "--max-failed-saves", "3",
                   "--checkpoint-every", "10")  # fmt: skip
    done = subprocess.run(args, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "could not be written" in done.stderr
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert "3 in a row were missed" in done.stderr
    # The first two were only warned of, each naming the file.
    assert done.stdout.count("training goes on to the next checkpoint") + done.stdout.count("is slow") == 2, done.stdout
    last = last_checkpoint(disk / "run")
    assert last >= 5
    assert f"last good checkpoint is {disk / 'run' / 'checkpoints'}" in done.stderr
    assert load_file(disk / "run" / "checkpoints" / f"step-{last:09d}.safetensors")
    assert not list((disk / "run" / "checkpoints").glob(".step-*"))
