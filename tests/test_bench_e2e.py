"""The benchmark from files to weights: the same losses before any speed, and whole rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bench import e2e
from bench.e2e import LOSSES, Case, E2eArgs, cases, disagreements, judged, ratios
from bench.step import LOSS_TOLERANCE, StepArgs
from bench.turns import Missing
from bench.ways import EAGER, LIGHTLY, OURS, WAYS, Steps, eager_steps, fastmoco_steps, lightly_steps


def assert_trains(steps: Steps, args: StepArgs) -> list[float]:
    """Two losses of random views by the first weights, after which steps change the loss."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, args.batch_size, 3, args.size, args.size)
    q, k, other_q, other_k = torch.rand(shape, generator=generator).half()
    backward, step = steps
    first = [backward((q, k)), backward((other_q, other_k))]
    again = backward((q, k))
    for _ in range(3):
        step((q, k))
    # The queue has these very keys by now; all that is asked is that the step is one.
    assert math.isfinite(after := backward((q, k))) and after != again
    return first


def test_the_steps_change_the_weights_and_the_first_losses_agree() -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    args = StepArgs(recipe="mocov2", arch="resnet18", size=32, batch_size=4, queue_size=64)
    eager = assert_trains(eager_steps(args), args)
    # The same arithmetic in the same precision: equal but for the order of sums.
    assert assert_trains(lightly_steps(args), args) == pytest.approx(eager, rel=1e-5)
    assert assert_trains(fastmoco_steps(args), args) == pytest.approx(eager, rel=LOSS_TOLERANCE)


def test_stage_losses_are_not_lightlys() -> None:
    args = StepArgs(recipe="histology-mse", arch="resnet18", size=64, batch_size=8, queue_size=64)
    with pytest.raises(Missing, match="no stage losses, which --recipe histology-mse has"):
        lightly_steps(args)
    first = assert_trains(eager_steps(args), args)
    assert assert_trains(fastmoco_steps(args), args) == pytest.approx(first, rel=LOSS_TOLERANCE)


def test_a_loss_that_is_off_is_said() -> None:
    said: list[str] = []
    losses = {EAGER: [8.0, 4.0], LIGHTLY: [8.0, 4.05], OURS: [8.4, 4.0]}
    errors = disagreements(losses, said.append)
    assert list(errors.values()) == pytest.approx([0, 0.0125, 0.05])
    assert ["PARITY FAILS" in line for line in said] == [False, False, True]
    for odd in ([math.nan, 4.0], [8.0, math.nan]):
        assert disagreements({EAGER: [8.0, 4.0], OURS: odd}, said.append)[OURS] == math.inf


def test_targets_are_judged_by_what_was_timed() -> None:
    figures = {EAGER: {"pairs_per_s": 4.0}, LIGHTLY: {"pairs_per_s": 5.0}, OURS: {"pairs_per_s": 11.0}}
    row = ratios(figures, OURS)
    assert row == {"ratio": 2.75, "ratio_lightly": 2.2}
    assert judged(row, Case("resnet50", 224, 16)) == {"target": "2.5x eager, 2x lightly", "met": "yes"}
    assert judged(row, Case("resnet18", 224, 16)) == {"target": "3x eager, 2x lightly", "met": "no: eager"}
    alone = ratios({EAGER: {"pairs_per_s": 4.0}, OURS: {"pairs_per_s": 12.0}}, OURS)
    assert alone == {"ratio": 3.0, "ratio_lightly": None}
    assert judged(alone, Case("resnet50", 64, 32)) == {"target": "3x eager", "met": "yes"}


def test_both_encoders_at_both_sizes_are_measured() -> None:
    assert [(case.arch, case.size, case.batch_size, case.to_eager) for case in cases(E2eArgs())] == [
        ("resnet18", 64, 32, 3.0),
        ("resnet50", 64, 32, 3.0),
        ("resnet18", 224, 16, 3.0),
        ("resnet50", 224, 16, 2.5),
    ]


@pytest.mark.system
def test_every_row_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    out = tmp_path / "e2e.md"
    assert e2e.main(E2eArgs(quick=True, workers=1, out=out)) == 0
    shown = capsys.readouterr().out
    rows = json.loads(out.with_suffix(".json").read_text())
    assert [row["implementation"] for row in rows] == list(WAYS)
    for row in rows:
        assert 0 < row["slow_pairs_per_s"] <= row["pairs_per_s"] <= row["fast_pairs_per_s"]
        assert 0 <= row["waiting"] < 1 and row["cpu_ms_per_pair"] > 0 and row["peak_mb"] > 50
        assert row["loss_error"] <= LOSS_TOLERANCE and len(row["every_turn"]) == row["turns"] == 2
        assert row["ratio"] > 0 and row["ratio_lightly"] > 0 and ("met" in row) == (row["implementation"] == OURS)
    assert rows[0]["implementation"] == EAGER and rows[0]["ratio"] == 1 and rows[0]["loss_error"] == 0
    assert rows[1]["implementation"] == LIGHTLY and rows[1]["ratio_lightly"] == 1
    assert shown.index("first losses") < shown.index("pairs/s"), "parity comes before speed"
    assert shown.count("off by") == len(WAYS) and LOSSES == 2
    assert all(row["implementation"] in out.read_text() for row in rows)
    assert (tmp_path / "e2e.png").read_bytes().startswith(b"\x89PNG")
