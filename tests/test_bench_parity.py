"""The table of parity: every operation holds, and one that does not is caught."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import parity
from bench.harness import Missing
from bench.parity import CHECKS, COLUMNS, LIMIT, ParityArgs, main, row


def test_every_operation_is_its_peers(tmp_path: Path) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    out = tmp_path / "parity.md"
    assert main(ParityArgs(out=out)) == 0
    rows = json.loads(out.with_suffix(".json").read_text())
    assert len({line["ours"] for line in rows}) == len(CHECKS) + 1
    for line in rows:
        assert line["holds"] and 0 <= line["value"] <= LIMIT
        assert line["gradient"] is None or 0 < line["gradient"] <= LIMIT
    text = out.read_text()
    assert all(name in text for name in COLUMNS)


def test_what_differs_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = next(check for check in CHECKS if check.ours == "ops.crosscorr")
    for scale in (1.0001, 1.0):
        wrong = replace(check, own=lambda a, b, scale=scale: scale * check.own(a, b) + (a - a.detach()).sum() * 1e-3)
        assert row(wrong)["holds"] is False
    monkeypatch.setattr(parity, "CHECKS", (wrong,))
    assert main(ParityArgs(out=tmp_path / "x.md")) == 1
    assert "ops.crosscorr" in (said := capsys.readouterr().out) and "DIFFERS" in said


def test_a_peer_that_is_not_there_is_named() -> None:
    def absent() -> None:
        raise Missing("lightly is not installed")

    line = row(replace(CHECKS[0], theirs=absent))  # type: ignore[arg-type]
    assert line["holds"] is None and line["peer"] == "lightly: lightly is not installed"
