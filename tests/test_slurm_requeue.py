"""When a job goes back into the queue: the decision, its record, and the script around it with stand-ins for SLURM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastmoco import cli
from fastmoco.errors import UserError
from fastmoco.slurm.requeue import End, read_record, refusal

ROOT = Path(__file__).resolve().parents[1]
KILLED, ASKED = 128 + signal.SIGKILL, 128 + signal.SIGUSR1


def end(status: int, step: int = 40, *, restart: int = 0, job: str = "7") -> End:
    return End(job, restart, status, step)


@pytest.mark.parametrize("status", [KILLED, 1, 75, ASKED, 128 + signal.SIGTERM])
def test_what_is_requeued(status: int) -> None:
    assert refusal(end(status), [], max_requeues=10) == ""


@pytest.mark.parametrize(
    ("status", "reason"),
    [(0, "it has finished"), (2, "a mistake"), (128 + signal.SIGINT, "interrupted by hand")],
)
def test_what_is_not(status: int, reason: str) -> None:
    assert reason in refusal(end(status), [], max_requeues=10)


def test_so_often_and_no_more() -> None:
    assert refusal(end(ASKED, restart=2), [], max_requeues=3) == ""
    assert "requeued 3 times, of at most 3 (--max-requeues)" in refusal(end(ASKED, restart=3), [], max_requeues=3)
    assert "requeued 0 times" in refusal(end(KILLED), [], max_requeues=0)


def test_the_same_accident_at_the_same_step_is_not_tried_again() -> None:
    before = [end(KILLED, 40), end(ASKED, 60, restart=1)]
    assert "at the same step before, in restart 0" in refusal(end(KILLED, 40, restart=2), before, max_requeues=10)
    for other in (end(KILLED, 41, restart=2), end(1, 40, restart=2), end(KILLED, 40, job="8")):
        assert refusal(other, before, max_requeues=10) == ""
    # To be told to save twice at one step is no accident.
    assert refusal(end(ASKED, 60, restart=2), before, max_requeues=10) == ""


def requeue(monkeypatch: pytest.MonkeyPatch, run: Path, status: int, restart: int = 0) -> int:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    return cli.dispatch(["slurm", "requeue", "--status", str(status), "--", "mocov2", "--out", str(run)])


def test_the_record_holds_every_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert requeue(monkeypatch, tmp_path, KILLED) == 0
    # A line cut short by the kill is not one of the steps.
    (tmp_path / "metrics.jsonl").write_text('{"step": 23}\n{"step": 24}\n{"st')
    assert requeue(monkeypatch, tmp_path, KILLED, 1) == 0
    assert requeue(monkeypatch, tmp_path, KILLED, 2) == 1
    said = capsys.readouterr().out.splitlines()
    assert "status 137 (SIGKILL), at step 0 of the training; requeued for the first time of at most 10" in said[0]
    assert "not requeued: it ended so at the same step before, in restart 1" in said[2]
    assert read_record(tmp_path) == [end(KILLED, 0), end(KILLED, 24, restart=1), end(KILLED, 24, restart=2)]


def test_before_there_is_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "first"
    assert requeue(monkeypatch, run, KILLED) == 0
    # What ends at the very start would be tried again and again, were that not noted.
    assert requeue(monkeypatch, run, KILLED, 1) == 1
    assert read_record(run) == [end(KILLED, 0), end(KILLED, 0, restart=1)]


def test_a_record_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert requeue(monkeypatch, tmp_path / "file" / "run", KILLED) == 0
    assert f"warning: {tmp_path}/file/run/requeue.json could not be written (Not a dir" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", '{"ends": [{"job": 1}]}', '{"ends": 3}'])
def test_a_record_that_cannot_be_read(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requeue.json").write_text(text)
    with pytest.raises(UserError, match=r"requeue\.json is not a record"):
        requeue(monkeypatch, tmp_path, KILLED)


def test_the_decision_does_not_wait_for_torch() -> None:
    # The nodes may be taken away some seconds after a signal, and a shared disk be slow.
    program = "import sys, fastmoco.slurm.requeue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_without_a_run_folder() -> None:
    for args in ([], ["--", "mocov2"], ["--", "mocov2", "--out"]):
        with pytest.raises(UserError, match="no run folder"):
            cli.dispatch(["slurm", "requeue", "--status", "1", *args])


def test_speeds_against_the_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no run named processes-1"):
        cli.dispatch(["slurm", "speeds", str(tmp_path)])
    for processes, speeds in ((1, [10, 100, 100]), (8, [10, 600, 600]), (16, [10, 1280, 1280])):
        run = tmp_path / f"processes-{processes}"
        run.mkdir()
        rows = [{"step": 1}, *({"step": step, "pairs_per_s": speed} for step, speed in enumerate(speeds, 2))]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.dispatch(["slurm", "speeds", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    expected = ["1 100.0 100.0 100.0%", "8 600.0 75.0 75.0%", "16 1,280.0 80.0 80.0%"]
    assert rows == [line.split() for line in expected]
    (tmp_path / "processes-1" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no speed in its metrics"):
        cli.dispatch(["slurm", "speeds", str(tmp_path)])


class Stage:
    """The rendered script with stand-ins: srun runs `step`, squeue says `state`, scontrol notes what it is told."""

    def __init__(self, folder: Path, step: str, state: str = "RUNNING", **environment: str) -> None:
        self.folder, self.run = folder, folder / "run"
        self.run.mkdir()
        for name, body in (
            ("srun", step),
            ("squeue", f'echo "$@" >> {folder}/squeue.txt; echo {state}'),
            ("scontrol", f'echo "$@" >> {folder}/scontrol.txt'),
        ):
            program = folder / name
            program.write_text(f"#!/bin/bash\n{body}\n")
            program.chmod(0o755)
        script = folder / "pretrain.sbatch"
        command = f"{sys.executable} -m fastmoco.cli"
        render = ["slurm", "render", "pretrain", "--command", command, "--out", str(script)]
        assert cli.dispatch([*render, "--", "mocov2", "--data", "/images", "--out", str(self.run)]) == 0
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", script],
            env=os.environ | {"PATH": path, "SLURM_JOB_ID": "7", "PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        """Send the script `number`, once the step has made the file `ready`."""
        while not (self.folder / "ready").exists():
            assert self.process.poll() is None, self.end()
            time.sleep(0.02)
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Exit status of the script, what it printed, and what scontrol was told."""
        said = self.process.communicate(timeout=60)[0]
        told = self.folder / "scontrol.txt"
        return self.process.returncode, said, told.read_text() if told.exists() else ""


def test_the_script_requeues_after_an_accident(tmp_path: Path) -> None:
    status, said, told = Stage(tmp_path, 'echo "$@"; exit 137').end()
    assert (status, told) == (137, "requeue 7\n"), said
    assert f"pretrain mocov2 --data /images --out {tmp_path}/run --resume" in said


def test_the_first_task_to_fail_says_why_and_not_those_that_srun_ended_then(tmp_path: Path) -> None:
    said = """
        echo 'error: no such folder' >&2
        echo 'srun: error: n0: task 0: Exited with exit code 2' >&2
        echo 'srun: error: n1: tasks 1-3: Terminated' >&2
        exit 143"""
    status, printed, told = Stage(tmp_path, said).end()
    assert (status, told) == (2, ""), printed
    assert "not requeued: its message names a mistake" in printed
    # All that it says is passed on, in its order.
    assert printed.index("no such folder") < printed.index("task 0: Exited") < printed.index("tasks 1-3: Terminated")


def test_tasks_that_were_ended_without_one_that_failed_were_asked_to(tmp_path: Path) -> None:
    status, printed, told = Stage(tmp_path, "echo 'srun: error: n1: task 1: Terminated' >&2; exit 143").end()
    assert (status, told) == (143, "requeue 7\n"), printed


def test_one_task_of_an_array_requeues_itself_alone(tmp_path: Path) -> None:
    # Its job's number may be that of the whole array.
    stage = Stage(tmp_path, "exit 137", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")
    status, said, told = stage.end()
    assert (status, told) == (137, "requeue 7_1\n"), said
    assert "--jobs=7_1" in (tmp_path / "squeue.txt").read_text()


def test_a_controller_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    status, said, told = Stage(tmp_path, "exit 137", "; exit 1").end()
    assert (status, told) == (137, "requeue 7\n"), said
    assert len((tmp_path / "squeue.txt").read_text().splitlines()) == 3


@pytest.mark.parametrize(("step", "state", "expected"), [("exit 0", "RUNNING", 0), ("exit 2", "RUNNING", 2),
                                                         ("exit 143", "COMPLETING", 143)])  # fmt: skip
def test_the_script_leaves_the_queue_alone(tmp_path: Path, step: str, state: str, expected: int) -> None:
    status, said, told = Stage(tmp_path, step, state).end()
    assert (status, told) == (expected, ""), said


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_script_passes_signals_on_and_waits_for_the_run_to_save(tmp_path: Path, number: signal.Signals) -> None:
    # Saving takes a second, in which the script must neither end nor decide.
    saves = f"trap 'sleep 1; touch {tmp_path}/run/saved; exit {ASKED}' USR1\ntouch {tmp_path}/ready\n"
    stage = Stage(tmp_path, saves + "while :; do sleep 0.05; done")
    stage.signal(number)
    status, said, told = stage.end()
    assert (status, told) == (ASKED, "requeue 7\n"), said
    assert (stage.run / "saved").exists()
    assert "status 138 (SIGUSR1), at step 0 of the training; requeued for the first time" in said


def test_a_task_that_saved_and_ended_before_the_others_says_what_asked_it_to(tmp_path: Path) -> None:
    ends = "trap \"echo 'srun: error: n1: task 1: Exited with exit code 138' >&2; exit 143\" USR1\n"
    stage = Stage(tmp_path, f"{ends}touch {tmp_path}/ready\nwhile :; do sleep 0.05; done")
    stage.signal(signal.SIGUSR1)
    status, printed, told = stage.end()
    assert (status, told) == (ASKED, "requeue 7\n"), printed
