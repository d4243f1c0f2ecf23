"""What slow steps have fall due by the clock: a line of metrics, a checkpoint."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest

from fastmoco.errors import UserError
from fastmoco.train import due
from fastmoco.train.config import RunConfig
from fastmoco.train.due import LINE, LINE_SECONDS, NOTHING, SAVE, Due
from fastmoco.train.metrics import read_rows
from fastmoco.train.pretrain import pretrain
from jobs import Job
from runs import draw_images, small_config


class Clock:
    """Stands for the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(due, "time", clock)
    return clock


def test_a_line_is_due_a_minute_after_the_last_and_a_checkpoint_after_its_minutes(clock: Clock) -> None:
    found = Due(2.0)
    clock.now += LINE_SECONDS - 1
    assert found.read() == NOTHING
    clock.now += 1
    assert found.read() == LINE
    found.restart(saved=False)
    assert found.read() == NOTHING
    clock.now += 60
    # Two minutes after it began, whatever lines there were.
    assert found.read() == SAVE
    found.restart(saved=True)
    clock.now += 119
    assert found.read() == LINE


def test_no_minutes_are_never(clock: Clock) -> None:
    found = Due(0)
    clock.now += 1e9
    assert found.read() == LINE


def slow_run(folder: Path, **changes: object) -> Path:
    """Six steps, none of which is due by its number but the last."""
    config = small_config(draw_images(folder), folder / "run", log_every=99, checkpoint_every=99, **changes)
    return pretrain(config)


def steps_with_speed(run: Path) -> list[int]:
    return [row["step"] for row in read_rows(run / "metrics.jsonl") if "pairs_per_s" in row]


def test_a_slow_run_shows_a_line_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(due, "LINE_SECONDS", 0.0)
    run = slow_run(tmp_path)
    assert steps_with_speed(run) == [1, 2, 3, 4, 5, 6]
    said = capsys.readouterr().out
    assert "step 1/6 " in said and "step 5/6 " in said
    assert [path.name for path in sorted((run / "checkpoints").iterdir()) if path.is_file()] == [
        "step-000000006.safetensors"
    ]


def test_a_fast_run_shows_them_by_number_alone(tmp_path: Path) -> None:
    assert steps_with_speed(slow_run(tmp_path)) == [6]


def test_slow_steps_are_saved_by_the_clock(tmp_path: Path) -> None:
    run = slow_run(tmp_path, checkpoint_minutes=1e-9, keep_checkpoints=9)
    assert steps_with_speed(run) == [1, 2, 3, 4, 5, 6]
    assert len([path for path in (run / "checkpoints").iterdir() if path.suffix == ".safetensors"]) >= 2


def test_saved_by_the_clock_or_not_a_run_computes_the_same(tmp_path: Path) -> None:
    fields = ("loss", "infonce")
    found = []
    for name, minutes in (("often", 1e-9), ("never", 0.0)):
        rows = read_rows(slow_run(tmp_path / name, checkpoint_minutes=minutes) / "metrics.jsonl")
        found.append([[row[field] for field in fields] for row in rows])
    assert found[0] == found[1] and len(found[0]) == 6


def only_of(deciding: int, rank: int) -> None:
    """In a process of `rank`: by its clock a checkpoint is always due, or, if it is not the one `deciding`, nothing."""
    Due.read = lambda _: SAVE if rank == deciding else NOTHING  # type: ignore[method-assign]


@pytest.mark.system
@pytest.mark.parametrize("deciding", [0, 1])
def test_the_first_process_decides_for_all(tmp_path: Path, deciding: int) -> None:
    images = draw_images(tmp_path)
    options = {"data": images, "out": tmp_path / "run", "steps": 6, "arch": "resnet18", "size": 32, "batch-size": 4}
    options |= {"workers": 0, "loader": "pillow", "device": "cpu", "log-every": 99, "checkpoint-every": 99}
    args = ["pretrain", "histology-mse-small", *(f"--{name}={value}" for name, value in options.items())]
    with Job(tmp_path / "job", 2, args, prepare=partial(only_of, deciding)) as job:
        assert job.end() == [0, 0], job.all_output()
    assert steps_with_speed(tmp_path / "run") == ([1, 2, 3, 4, 5, 6] if deciding == 0 else [6])


@pytest.mark.parametrize("minutes", [-1.0, float("inf"), float("nan")])
def test_minutes_that_are_none_are_refused(minutes: float) -> None:
    with pytest.raises(UserError, match="--checkpoint-minutes must be 0"):
        RunConfig(out=Path(), checkpoint_minutes=minutes)
    assert dataclasses.replace(RunConfig(out=Path()), checkpoint_minutes=0.0).checkpoint_minutes == 0
