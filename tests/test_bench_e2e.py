"""The benchmark from files to weights: the same losses before any speed, and whole rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bench import e2e
from bench.e2e import PAPER, WAYS, E2eArgs, _ours, _papers, disagreements
from bench.step import LOSS_TOLERANCE, StepArgs


def test_the_steps_change_the_weights_and_the_first_losses_do_not() -> None:
    args = StepArgs(recipe="histology-mse", arch="resnet18", size=32, batch_size=4)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.rand(4, 3, 32, 32, generator=generator).half() for _ in range(2))
    first = {}
    for make in (_papers, _ours):
        backward, step = make(args)
        first[make] = backward((q, k))
        for _ in range(3):
            step((q, k))
        # The queue has these very keys by now; all that is asked is that the step is one.
        assert math.isfinite(after := backward((q, k))) and after != first[make]
    assert first[_ours] == pytest.approx(first[_papers], rel=LOSS_TOLERANCE)


def test_a_loss_that_is_off_is_said() -> None:
    said: list[str] = []
    losses = dict(zip(WAYS, (8.0, 8.1, 8.4), strict=True))
    errors = disagreements(losses, said.append)
    assert list(errors.values()) == pytest.approx([0, 0.0125, 0.05])
    assert ["PARITY FAILS" in line for line in said] == [False, False, True]
    assert not disagreements({PAPER: 8.0, "fastmoco": math.nan}, said.append)["fastmoco"] <= LOSS_TOLERANCE


@pytest.mark.system
def test_every_row_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "e2e.md"
    assert e2e.main(E2eArgs(quick=True, workers=1, out=out)) == 0
    shown = capsys.readouterr().out
    rows = json.loads(out.with_suffix(".json").read_text())
    assert [row["implementation"] for row in rows] == list(WAYS)
    for row in rows:
        assert 0 < row["slow_pairs_per_s"] <= row["pairs_per_s"] <= row["fast_pairs_per_s"]
        assert 0 <= row["waiting"] < 1 and row["cpu_ms_per_pair"] > 0 and row["memory_mb"] > 50
        assert row["loss_error"] <= LOSS_TOLERANCE and len(row["every_turn"]) == row["turns"] == 2
    assert rows[0]["implementation"] == PAPER and rows[0]["ratio"] == 1 and rows[0]["loss_error"] == 0
    assert shown.index("first loss") < shown.index("pairs/s"), "parity comes before speed"
    assert all(row["implementation"] in out.read_text() for row in rows)
    assert (tmp_path / "e2e.png").read_bytes().startswith(b"\x89PNG")
