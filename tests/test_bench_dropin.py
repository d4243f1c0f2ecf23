"""The benchmark of lightly's loop: three loops of one training, by turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.dropin import VARIANTS, DropInArgs, main
from runs import draw_images


def test_the_loops_train_by_turns(tmp_path: Path) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    draw_images(tmp_path / "images", 12)
    args = DropInArgs(
        data=tmp_path / "images", arch="resnet18", size=32, batch_size=4, steps=2, turns=1, workers=0,
        out=tmp_path / "x.md",
    )  # fmt: skip
    assert main(args) == 0
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["implementation"] for row in rows] == list(VARIANTS) and rows[0]["ratio"] == 1
    for row in rows:
        assert row["slow_pairs_per_s"] <= row["pairs_per_s"] <= row["fast_pairs_per_s"] and 0 <= row["loading"] <= 1
        assert len(row["losses"]) == 4 and all(0 < loss < 20 for loss in row["losses"])
