"""The benchmark of lightly's loop: loops of one training by turns, and their losses over several seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import dropin, dropin_curves
from bench.command import start
from bench.dropin import ALL, LIGHTLY, UNTIMED, VARIANTS, DropInArgs, judged
from bench.dropin_curves import COMPARED, CurvesArgs, verdict
from bench.example import OURS, PARTS, Example, Laps
from bench.step import as_run
from fastmoco.errors import UserError
from runs import draw_images

SMALL = {"arch": "resnet18", "size": 32, "batch_size": 4, "workers": 0}


def test_the_loops_train_by_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    draw_images(tmp_path / "images", 12)
    args = DropInArgs(data=tmp_path / "images", steps=2, turns=1, out=tmp_path / "x.md", **SMALL)
    assert dropin.main(args) == 0
    shown = capsys.readouterr().out
    assert shown.index("first loss") < shown.index("pairs/s"), "parity comes before speed"
    assert shown.endswith(f"written: {tmp_path / 'x.md'} and {tmp_path / 'x.json'}\n")
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["implementation"] for row in rows] == list(VARIANTS) and rows[0]["ratio"] == rows[0]["gain"] == 1
    assert [row["precision"] for row in rows] == [*["fp32 NCHW"] * 3, str(as_run("cpu"))] and list(VARIANTS)[-1] == ALL
    for row in rows:
        assert row["ratio_low"] == row["ratio"] == row["ratio_high"]
        assert row["slow_pairs_per_s"] <= row["pairs_per_s"] <= row["fast_pairs_per_s"]
        assert len(row["losses"]) == UNTIMED + 2 and all(0 < loss < 20 for loss in row["losses"])
        assert list(row["parts"]) == list(PARTS) and all(part["ms"] > 0 for part in row["parts"].values())
        # The parts are all of a step.
        assert 0.9 < sum(part["share"] for part in row["parts"].values()) <= 1
    assert rows[-1]["ratio"] == pytest.approx(np.prod([row["gain"] for row in rows]))
    text = (tmp_path / "x.md").read_text()
    assert judged(rows[-1]["ratio"]) in text and str(tmp_path) not in text
    options = "--arch resnet18 --size 32 --batch-size 4 --workers 0 --steps 2 --turns 1"
    assert f"`python -m bench.dropin --data IMAGES {options} --out x.md`" in text


def test_nothing_is_written_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    draw_images(tmp_path / "images", 12)
    monkeypatch.chdir(tmp_path)
    for module in (dropin, dropin_curves):
        name = "VARIANTS" if module is dropin else "COMPARED"
        monkeypatch.setattr(module, name, {LIGHTLY: VARIANTS[LIGHTLY]})
    assert dropin.main(DropInArgs(data=tmp_path / "images", steps=1, turns=1, **SMALL)) == 0
    assert dropin_curves.main(CurvesArgs(data=tmp_path / "images", seeds=2, steps=3, **SMALL)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["images"] and "written" not in capsys.readouterr().out


def test_a_loss_that_is_off_has_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    draw_images(tmp_path / "images", 12)
    monkeypatch.setattr(dropin, "VARIANTS", {name: VARIANTS[name] for name in (LIGHTLY, "our operations")})
    monkeypatch.setattr(dropin, "first_losses", lambda loops, args: {LIGHTLY: 0.0, "our operations": float("nan")})
    args = DropInArgs(data=tmp_path / "images", steps=1, turns=1, out=tmp_path / "x.md", **SMALL)
    assert dropin.main(args) == 1
    rows = json.loads((tmp_path / "x.json").read_text())
    assert ["pairs_per_s" in row for row in rows] == [True, False] and "not timed" in capsys.readouterr().out


def test_the_target_is_judged() -> None:
    assert judged(2.0).endswith("met, 2.00 times.") and "NOT MET" not in judged(2.0)
    assert judged(1.98).endswith("NOT MET, 1.98 times.")


def test_every_part_of_a_step_is_timed_once() -> None:
    torch.manual_seed(0)
    example = Example("resnet18", OURS, bank=8, temperature=0.2, momentum=0.9, lr=0.1)
    laps, (x0, x1) = Laps(), torch.rand(2, 4, 3, 32, 32)
    before = example.head.state_dict()["layers.0.weight"].clone()
    assert example.step(x0, x1, laps).isfinite()
    assert (example.head.state_dict()["layers.0.weight"] != before).any()
    assert all(laps.seconds[part] > 0 for part in PARTS[1:]) and laps.seconds[PARTS[0]] == 0


def test_the_curves_of_every_seed_are_compared(tmp_path: Path) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    draw_images(tmp_path / "images", 12)
    args = CurvesArgs(data=tmp_path / "images", seeds=2, steps=3, out=tmp_path / "x.md", **SMALL)
    status = dropin_curves.main(args)
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["implementation"] for row in rows] == list(COMPARED)
    assert rows[0]["difference"] == 0 and status == (0 if all(row["within"] for row in rows) else 1)
    for row in rows:
        assert np.array(row["losses"]).shape == (2, 3) and row["losses"][0] != row["losses"][1]
    # Of the same seed and images, weights and negatives are the same: only the rounding of the first loss differs.
    assert rows[1]["losses"][0][0] == pytest.approx(rows[0]["losses"][0][0], rel=1e-4)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="--seeds must be at least 2"):
        dropin_curves.main(CurvesArgs(data=tmp_path / "images", seeds=1, **SMALL))


def test_curves_agree_within_the_spread_of_lightlys_seeds() -> None:
    ends = np.array([1.0, 2.0, 3.0])
    theirs = np.column_stack([np.full((3, 4), 9.0), ends - 0.5, ends + 0.5])
    # The last third of 6 steps; a deviation of 1 in both.
    assert verdict(theirs + 2, theirs) == {
        "loss_at_end": 4.0, "deviation": 1.0, "difference": 2.0, "limit": 2.0, "within": True,
        "differences": [2.0, 2.0, 2.0], "by_seed": "+2.0000, +2.0000, +2.0000",
    }  # fmt: skip
    assert not verdict(theirs + 2.01, theirs)["within"]
    # What spreads more than theirs is not excused by that.
    found = verdict(2 + 9 * (theirs - 2), theirs)
    assert found["limit"] == 2 and found["differences"] == [-8, 0, 8] and found["by_seed"].startswith("-8.0000, +0.")
    assert not verdict(np.full((3, 6), np.nan), theirs)["within"]


@pytest.mark.parametrize(("module", "kind"), [(dropin, DropInArgs), (dropin_curves, CurvesArgs)])
def test_a_folder_and_an_encoder_that_are_not_there_are_told(
    module: Any, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--data", str(tmp_path / "nope")])
    with pytest.raises(SystemExit) as stop:
        start(module.main, kind, "x")
    assert stop.value.code == f"error: --data {tmp_path / 'nope'}: no such folder; name one with images"
    monkeypatch.setattr("sys.argv", ["x", "--data", str(tmp_path), "--arch", "vgg"])
    with pytest.raises(SystemExit) as stop:
        start(module.main, kind, "x")
    said = capsys.readouterr()
    assert stop.value.code == 2 and "--arch" in said.out + said.err and "resnet18" in said.out + said.err
