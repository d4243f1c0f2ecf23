"""Jobs of a real SLURM of two nodes: trained on both, told to stop, cancelled, killed. `make test-system`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastmoco import cli
from fastmoco.train.metrics import read_rows
from slurm_cluster import Cluster, cluster, missing, wait_for
from studies import draw_study

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[1]
STEPS = 40
QUICK = [
    "--arch", "resnet18", "--size", "32", "--dim", "32", "--queue-size", "31", "--workers", "1", "--loader", "pillow",
    "--precision", "fp32",
]  # fmt: skip
# What depends on the time, or only rows of logging steps have: a stop is one more of those.
LEFT_OUT = {"pairs_per_s", "data_wait", "queue_fill", "bad_files"}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """The cluster of all tests here. Where there can be none they are skipped; under CI that is a failure."""
    if reason := missing():
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with cluster() as made:
        made.environment |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(made.folder / "cache")}
        made.environment |= {"PYTHONPATH": str(ROOT)}
        yield made


class Job:
    """A job that the script of `fastmoco slurm render pretrain` describes, in a folder of its own."""

    def __init__(self, slurm: Cluster, folder: Path, images: Path, *options: str, job: tuple[str, ...] = ()) -> None:
        folder.mkdir()
        self.slurm, self.folder, self.out = slurm, folder, folder / "run"
        script = folder / "pretrain.sbatch"
        asked = [
            "--nodes", "2", "--gpus", "0", "--cpus", "1", "--time", "10", "--notice", "60", *job,
            "--command", f"{sys.executable} -m fastmoco.cli", "--out", str(script),
        ]  # fmt: skip
        pretrain = [
            "histology-mse-small", "--data", str(images), "--out", str(self.out), "--batch-size", "8", *QUICK,
            "--steps", str(STEPS), "--log-every", "2", "--checkpoint-every", "7", *options,
        ]  # fmt: skip
        assert cli.dispatch(["slurm", "render", "pretrain", *asked, "--", *pretrain]) == 0
        self.id = slurm.submit(script, cwd=folder)

    def output(self) -> str:
        """What the job has printed so far, in all its starts."""
        return "".join(path.read_text() for path in self.folder.glob("*.out"))

    def reaches(self, step: int) -> None:
        """Wait until the metrics hold a row of `step`."""
        wait_for(
            lambda: "yes" if len(read_rows(self.out / "metrics.jsonl")) >= step else "",
            timeout=300, every=0.02, otherwise=self.output,
        )  # fmt: skip

    def ends(self, state: str = "COMPLETED") -> None:
        """Wait until the job is over; AssertionError, with its output, where it is not in `state` then."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        found = self.slurm.wait(self.id, *over, timeout=600)
        assert found == state, f"{found}\n{self.output()}\n{self.slurm.logs()}"

    def record(self) -> list[dict[str, Any]]:
        """The ends that the run folder knows."""
        ends: list[dict[str, Any]] = json.loads((self.out / "requeue.json").read_text())["ends"]
        return ends


def results(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The last checkpoint's tensors, and the rows of the metrics less LEFT_OUT."""
    rows = [{k: v for k, v in row.items() if k not in LEFT_OUT} for row in read_rows(out / "metrics.jsonl")]
    return load_file(out / "checkpoints" / f"step-{STEPS:09d}.safetensors"), rows


def assert_same_end(actual: Path, expected: Path) -> None:
    tensors, rows = results(expected)
    found, found_rows = results(actual)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert found_rows == rows
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def images(real_data: Callable[[str], Path]) -> Path:
    return real_data("idc_patches")


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that nothing happened to."""
    job = Job(slurm, tmp_path_factory.mktemp("undisturbed") / "job", images)
    job.ends()
    return job


def test_it_trains_on_both_nodes(undisturbed: Job) -> None:
    print(undisturbed.output())
    rows = results(undisturbed.out)[1]
    assert len(rows) == STEPS
    assert not (undisturbed.out / "requeue.json").exists()


def test_a_clone_in_which_two_lines_were_edited(slurm: Cluster, images: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "slurm", clone / "slurm")
    script = clone / "slurm" / "pretrain.sbatch"
    options = f"options=(mocov2-small --data {images} --out {tmp_path}/run --batch-size 8 {' '.join(QUICK)} --steps 4)"
    text, partitions = re.subn("^#SBATCH --partition=.*$", "#SBATCH --partition=test", script.read_text(), flags=re.M)
    text, edits = re.subn(r"^options=.*$", options, text, flags=re.M)
    assert (partitions, edits) == (1, 1)
    # This cluster has no GPUs, and two processors a node.
    script.write_text(text.replace("#SBATCH --gpus-per-node=8\n", ""))
    program = tmp_path / "fastmoco"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m fastmoco.cli "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{slurm.environment['PATH']}"
    small = ("--ntasks-per-node=1", "--cpus-per-task=1", f"--export=ALL,PATH={path}")
    job = slurm.submit(Path("slurm/pretrain.sbatch"), *small, cwd=clone)
    slurm.wait(job, "COMPLETED", "FAILED", timeout=600)
    (said,) = [path.read_text() for path in clone.glob("*.out")]
    assert slurm.field(job, "JobState") == "COMPLETED", said
    assert "by 2 processes" in said and len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 4


def test_a_signal_requeues_it_and_nothing_is_lost(
    slurm: Cluster, images: Path, undisturbed: Job, tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path / "job", images)
    job.reaches(12)
    slurm.call("scancel", "--batch", "--signal=USR1", job.id)
    job.ends()
    print(job.output())
    assert slurm.field(job.id, "Restarts") == "1"
    (end,) = job.record()
    assert end["status"] == 128 + signal.SIGUSR1 and 12 <= end["step"] < STEPS
    assert_same_end(job.out, undisturbed.out)


def test_one_killed_process_ends_the_job_soon_and_it_goes_on(
    slurm: Cluster, images: Path, undisturbed: Job, tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path / "job", images)
    job.reaches(16)
    (victim,) = processes(job, rank=1)
    start = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: "" if processes(job) else "gone", timeout=30, otherwise=job.output)
    print(f"all processes had ended {time.monotonic() - start:.1f} s after one was killed")
    job.ends()
    assert slurm.field(job.id, "Restarts") == "1"
    assert "rank 1 on n1" in job.output()
    (end,) = job.record()
    assert end["status"] == 128 + signal.SIGKILL and 16 <= end["step"] < STEPS
    assert_same_end(job.out, undisturbed.out)


def test_a_mistake_is_not_tried_again(slurm: Cluster, images: Path, tmp_path: Path) -> None:
    # Found by the processes only: what can be known beforehand, rendering refuses.
    job = Job(slurm, tmp_path / "job", images, "--init", str(tmp_path / "nowhere"))
    job.ends("FAILED")
    assert slurm.field(job.id, "Restarts") == "0"
    assert slurm.field(job.id, "ExitCode") == "2:0"
    assert "nowhere" in job.output() and "not requeued: its message names a mistake" in job.output()


def test_a_cancelled_job_saves_and_stays_cancelled(slurm: Cluster, images: Path, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path / "job", images)
    job.reaches(12)
    slurm.call("scancel", job.id)
    job.ends("CANCELLED")
    wait_for(lambda: "" if processes(job) else "gone", timeout=30, otherwise=job.output)
    assert slurm.field(job.id, "Restarts") == "0"
    saved = sorted((job.out / "checkpoints").glob("step-*.safetensors"))[-1]
    assert 12 <= int(saved.stem.rpartition("-")[2]) < STEPS


def test_before_its_time_is_up_it_saves_and_is_requeued(slurm: Cluster, images: Path, tmp_path: Path) -> None:
    # SLURM gives times in minutes, and looks for those that are nearly up twice a minute: the notice comes after one to
    # two minutes, in which the run has begun.
    times = ("--time", "3", "--notice", "60")
    job = Job(slurm, tmp_path / "job", images, "--steps", "100000", job=times)
    wait_for(lambda: "yes" if slurm.field(job.id, "Restarts") == "1" else "", timeout=300, otherwise=job.output)
    slurm.call("scancel", job.id)
    (end,) = job.record()
    assert end["status"] == 128 + signal.SIGUSR1
    assert f"stopped at step {end['step']} of 100000; saved" in job.output()
    assert (job.out / "checkpoints" / f"step-{end['step']:09d}.safetensors").is_file()


def test_one_task_of_a_study_requeues_itself_alone(slurm: Cluster, images: Path, tmp_path: Path) -> None:
    script, study = tmp_path / "study.sbatch", tmp_path / "runs"
    asked = [
        "--recipes", "histology-mse-small", "--seeds", "0", "1", "--gpus", "0", "--cpus", "1", "--time", "10",
        "--notice", "60", "--command", f"{sys.executable} -m fastmoco.cli", "--out", str(script),
    ]  # fmt: skip
    options = ["--data", str(images), "--out", str(study), "--batch-size", "8", *QUICK, "--steps", "100000"]
    assert cli.dispatch(["slurm", "render", "study", *asked, "--", *options]) == 0
    array = slurm.submit(script, cwd=tmp_path)
    tasks = [f"{array}_0", f"{array}_1"]
    runs = [study / "histology-mse-small" / f"seed-{seed}" for seed in (0, 1)]

    def said() -> str:
        return "".join(path.read_text() for path in tmp_path.glob("*.out"))

    def both_train() -> str:
        return "yes" if all(read_rows(run / "metrics.jsonl") for run in runs) else ""

    wait_for(both_train, timeout=300, otherwise=said)
    # The job of one of them has the array's number.
    numbers = [slurm.call("squeue", "--noheader", "--format=%A", f"--jobs={task}").strip() for task in tasks]
    told = numbers.index(array)
    slurm.call("scancel", "--batch", "--signal=USR1", tasks[told])

    def again() -> str:
        return "yes" if slurm.field(tasks[told], "Restarts") == "1" else ""

    wait_for(again, timeout=300, otherwise=said)
    assert slurm.field(tasks[1 - told], "Restarts") == "0"
    assert slurm.field(tasks[1 - told], "JobState") == "RUNNING"
    assert [(run / "requeue.json").exists() for run in runs] == [task == told for task in (0, 1)]
    slurm.call("scancel", array)


def test_tasks_of_an_array_share_the_cells_of_a_study(slurm: Cluster, tmp_path: Path) -> None:
    file, script = draw_study(tmp_path), tmp_path / "grid.sbatch"
    asked = [
        "--tasks", "2", "--gpus", "0", "--cpus", "1", "--time", "30",
        "--command", f"{sys.executable} -m fastmoco.cli", "--out", str(script),
    ]  # fmt: skip
    assert cli.dispatch(["slurm", "render", "grid", *asked, "--", str(file)]) == 0
    array = slurm.submit(script, cwd=tmp_path)

    def said() -> str:
        return "".join(path.read_text() for path in tmp_path.glob("*.out"))

    def ended() -> str:
        return "" if slurm.call("squeue", "--noheader", f"--jobs={array}").strip() else "yes"

    wait_for(ended, timeout=500, otherwise=said)
    outputs = [path.read_text() for path in sorted(tmp_path.glob("*.out"))]
    done = [set(re.findall(r"^(\S+): done in", text, re.MULTILINE)) for text in outputs]
    # Each did some, none did another's, and nothing is left.
    assert len(done) == 2 and all(done) and not done[0] & done[1]
    assert done[0] | done[1] == {path.stem for path in (tmp_path / "out" / "cells").iterdir()}
    assert cli.dispatch(["study", str(file), "--report", "only"]) == 0


def test_the_preflight_of_two_nodes(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    command = [sys.executable, "-m", "fastmoco.cli", "doctor", "--distributed", "--out", tmp_path / "shared"]
    said = slurm.call("srun", "--nodes=2", "--ntasks=2", *command, cwd=ROOT)
    assert "2 processes on 2 nodes can train together" in said
    assert "n0, n1" in said and "GB/s" in said
    assert not list((tmp_path / "shared").iterdir())


def processes(job: Job, rank: int | None = None) -> list[int]:
    """The processes of the job's pretraining that run, or that of `rank`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ours = b"pretrain" in words and str(job.out).encode() in words and b"srun" not in words[0]
        if ours and (rank is None or f"SLURM_PROCID={rank}".encode() in environment):
            found.append(int(folder.name))
    return found
