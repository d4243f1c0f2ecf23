"""The benchmark of views: whole rows, errors before times, and DALI's errors beside ours where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import views
from bench.views import COLUMNS, ViewsArgs, apart, main
from fastmoco.data.dali import dali_installed
from fastmoco.ops import dispatch

pytestmark = pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING)


def test_every_row_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "views.md"
    assert main(ViewsArgs(quick=True, out=out)) == 0
    *rows, decoded = json.loads(out.with_suffix(".json").read_text())
    names = [row["operation"] for row in rows]
    assert len(set(names)) == len(names) and {"hue", "flip", "two resizes"} < set(names)
    assert sum(name.startswith(("histology", "chest-xray", "fundus", "mocov2")) for name in names) == 4
    for row in rows:
        assert 0 <= row["ours_mean"] <= row["ours_max"] <= views.TOLERANCE
        assert 0 < row["ours_p20_ms"] <= row["ours_ms"] <= row["ours_p80_ms"]
        assert row["ratio"] == pytest.approx(row["torchvision_ms"] / row["ours_ms"])
    native = {row["operation"]: row["dali_max"] for row in [*rows, decoded] if row["dali_max"] is not None}
    if dali_installed():
        # What it does as torchvision does, but for rounding; what it is known to do otherwise.
        assert native["flip"] < 0.2 and native["rotation by 20 degrees"] < 0.2 and native["contrast"] > 5
        assert native["blur, sigma 2"] < 0.2 and "two resizes" not in native
    else:
        assert not native
    text = out.read_text()
    assert all(name in text for name in [*COLUMNS, *names, decoded["operation"]])


def test_what_is_too_far_off_gets_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [np.full((16, 16, 3), 100, dtype=np.uint8)]
    works = views.operations(pictures, 16)[4:6]
    monkeypatch.setattr(views, "operations", lambda *_: works)
    monkeypatch.setattr(views, "recipes", lambda *_: [])
    monkeypatch.setattr(views, "TOLERANCE", -1.0)
    assert main(ViewsArgs(quick=True)) == 1
    shown = capsys.readouterr().out
    assert shown.count("PARITY FAILS") == 2 and "brightness" in shown


def test_without_the_extension_it_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "native", None)
    monkeypatch.setattr(dispatch, "NATIVE_MISSING", "it was not built")
    assert main(ViewsArgs(quick=True, out=tmp_path / "x.md")) == 0 and not list(tmp_path.iterdir())
    assert capsys.readouterr().out == "views: left out, it was not built\n"


def test_errors_are_in_255ths() -> None:
    assert apart(np.array([0.0, 1.0]), np.array([0.0, 1 - 2 / 255])) == pytest.approx((2.0, 1.0))
    assert apart(None, np.zeros(2)) == (None, None)
