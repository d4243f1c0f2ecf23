"""The runner of all benchmarks: parity first, progress, failures told at the end, one page."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import tyro

from bench import (
    crosscorr,
    data,
    dropin,
    e2e,
    ema,
    harness,
    infonce,
    page,
    parity,
    pooled_mse,
    scaling,
    startup,
    suite,
    views,
)
from bench import step as training_step
from bench.gpu import Outcome, Step
from bench.suite import PARTS, Part, SuiteArgs, expected, main, total

TYRO = {
    "parity": parity.ParityArgs,
    "views": views.ViewsArgs,
    "data": data.DataArgs,
    "step": training_step.StepArgs,
    "e2e": e2e.E2eArgs,
    "dropin": dropin.DropInArgs,
    "scaling": scaling.ScalingArgs,
    "startup": startup.StartupArgs,
}
HARNESS = {"infonce": infonce, "crosscorr": crosscorr, "pooled_mse": pooled_mse, "ema": ema}


class Parsed(Exception):
    """The options were understood."""


def code(name: str, out: Path, what: str = "") -> str:
    row = {"op": name, "implementation": "fastmoco", "ratio": 1.0}
    return f"open({str(out / name)!r} + '.json', 'w').write({json.dumps([row])!r}); print('measured'); {what}"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Three parts that write a row each, run in place of the benchmarks; what is run, in order."""
    names: list[str] = []
    parts = (Part("parity", "", "", (5, 5)), Part("step", "", "", (30, 60)), Part("ema", "", "", (16, 20)))

    def fake(part: Part, out: Path, images: Path, *, full: bool) -> Step:
        names.append(part.name)
        fails = (tmp_path / f"{part.name} fails").exists()
        what = code(part.name, out, "raise SystemExit(3)" if fails else "")
        return Step(part.name, [sys.executable, "-c", what], 30.0)

    monkeypatch.setattr(suite, "PARTS", parts)
    monkeypatch.setattr(suite, "step", fake)
    monkeypatch.setattr(page, "main", lambda args: names.append(f"page of {args.results.name}") or 0)
    return names


def test_parts_run_in_order_and_the_page_is_made(
    ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(SuiteArgs(out=out)) == 0
    assert ran == ["parity", "step", "ema", "page of out"]
    said = capsys.readouterr().out
    assert "[2/3] step ... 0:0" in said and "to go" in said and "[3/3] ema: passed" in said
    assert (out / "logs" / "step.log").read_text() == "measured\n" and (out / "ema.json").exists()


def test_a_failing_part_is_told_at_the_end_and_leaves_no_old_result(
    ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "step fails").touch()
    (tmp_path / "step.md").write_text("of before")
    assert main(SuiteArgs(out=tmp_path)) == 1
    assert ran[-2:] == ["ema", "page of " + tmp_path.name]
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("FAILED step: ") and "    measured" in said
    assert not (tmp_path / "step.md").exists()


def test_without_parity_no_speed_is_measured(ran: list[str], tmp_path: Path) -> None:
    (tmp_path / "parity fails").touch()
    assert main(SuiteArgs(out=tmp_path)) == 1 and ran == ["parity"]


def test_some_parts_alone_have_parity_first(ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SuiteArgs(out=tmp_path)) == 0 and "of an earlier run" not in capsys.readouterr().out
    ran.clear()
    assert main(SuiteArgs(out=tmp_path, parts=("ema",))) == 0
    assert ran[:2] == ["parity", "ema"]
    # What is left from before is not taken for new.
    assert "of an earlier run, not measured now: step\n" in capsys.readouterr().out
    assert main(SuiteArgs(out=tmp_path, parts=("emma",))) == 2


def test_more_than_ten_minutes_is_told() -> None:
    assert total(599.0, full=False) == "measured in 9:59"
    assert "10:01: LONGER" in total(601.0, full=False) and total(601.0, full=True) == "measured in 10:01"


def test_what_is_told_is_all_of_the_time(
    ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drawing included, where the parts take none."""
    monkeypatch.setattr(suite, "PARTS", (Part("parity", "", "", (5, 5)), Part("data", "IMAGES", "", (5, 5))))
    monkeypatch.setattr(suite, "run", lambda job, logs, limit: Outcome(job.name, "passed", 0.0, f"{job.name}.log"))
    monkeypatch.setattr(suite, "draw_photographs", lambda *args: time.sleep(0.3))
    monkeypatch.setattr(suite, "PROMISED", 0.2)
    assert main(SuiteArgs(out=tmp_path)) == 0 and "LONGER" in capsys.readouterr().out


def test_what_took_its_time_before_is_expected_to(tmp_path: Path) -> None:
    parts = PARTS[:3]
    assert expected(parts, tmp_path, full=False) == {part.name: part.seconds[0] for part in parts}
    rows = [
        {"step": "parity", "status": "passed", "seconds": 77.0, "full": False},
        {"step": "infonce", "status": "failed (1)", "seconds": 1.0, "full": False},
    ]
    (tmp_path / "logs").mkdir()
    (tmp_path / suite.RECORD).write_text(json.dumps(rows))
    suite.record(tmp_path, Outcome("crosscorr", "passed", 9.0, "crosscorr.log"), full=True)
    suite.record(tmp_path, Outcome("crosscorr", "passed", 8.0, "crosscorr.log"), full=True)
    assert len(suite.recorded(tmp_path)) == 3 and expected(parts, tmp_path, full=True)["crosscorr"] == 8
    assert expected(parts, tmp_path, full=False)["parity"] == 77
    assert expected(parts, tmp_path, full=False)["infonce"] == PARTS[1].seconds[0]
    assert expected(parts, tmp_path, full=True)["parity"] == PARTS[0].seconds[1]


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [part.name for part in suite.chosen(("ema", "dropin"))] == ["parity", "ema"]
    assert "dropin: left out, lightly is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_part_understands_its_options(
    part: Part, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = suite.step(part, tmp_path, tmp_path / "images", full=full)
    python, flag, module, *options = job.command
    assert (python, flag, module) == (sys.executable, "-m", f"bench.{part.name}")
    assert job.environment["XDG_CACHE_HOME"].startswith(os.fspath(tmp_path))
    if part.name in HARNESS:

        def measure(device: str) -> None:
            assert device == "cpu", "the page is of one device"
            raise Parsed

        # Where there is a GPU, it is what they would take.
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr(harness, "measure", measure)
        with pytest.raises(Parsed):
            HARNESS[part.name].main(options)
        return
    assert tyro.cli(TYRO[part.name], args=options).out == tmp_path / f"{part.name}.md"


def test_all_of_the_page_is_measured_in_ten_minutes() -> None:
    assert {part.name for part in PARTS} == {name for section in page.SECTIONS for name in section.files}
    assert PARTS[0].name == "parity" and sum(part.seconds[0] for part in PARTS) < 540
