"""The benchmark of start-up: a run is ended at its first step, and one that takes none is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import startup
from bench.startup import COLD, KNOWN, LISTED, StartupArgs, failures, first_step, main, run
from fastmoco.errors import UserError


def test_the_first_step_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the command: a module that writes its row in two parts, then would go on for a minute."""
    (tmp_path / "fastmoco").mkdir()
    (tmp_path / "fastmoco" / "__init__.py").touch()
    (tmp_path / "fastmoco" / "__main__.py").write_text(
        "import sys, time, pathlib\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1], 'metrics.jsonl')\n"
        f"pathlib.Path({str(tmp_path / 'asked')!r}).write_text(' '.join(sys.argv[1:]))\n"
        "if '--fails' in sys.argv: sys.exit('no such data')\n"
        "stream = out.open('w'); stream.write('{'); stream.flush(); time.sleep(0.2); stream.write('}\\n')\n"
        f"stream.flush(); time.sleep(60); pathlib.Path({str(tmp_path / 'late')!r}).touch()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first_step("--data", "IMAGES", cache=tmp_path, limit=30)
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("pretrain mocov2-small --out ") and asked.endswith("--data IMAGES")
    assert not (tmp_path / "late").exists()
    with pytest.raises(UserError, match="no such data"):
        first_step("--fails", cache=tmp_path, limit=30)


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not this one"):
        run("-c", "raise SystemExit('not this one')", cache=tmp_path)


def test_a_row_for_everything_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def note(*options: str, cache: Path, limit: float) -> None:
        assert len(list(Path(options[1]).glob("*.jpg"))) == 3
        asked.append([*options[2:3], str(any(cache.iterdir()))])

    monkeypatch.setattr(startup, "first_step", note)
    monkeypatch.setattr(startup, "DISTINCT", 2)
    first, second, *_ = startup.IMPORTS
    codes = {first: "import json", second: "import a_module_that_is_absent"}
    monkeypatch.setattr(startup, "IMPORTS", codes)
    out = tmp_path / "x.md"
    assert main(StartupArgs(images=3, rounds=2, out=out)) == 0
    rows = json.loads(out.with_suffix(".json").read_text())
    assert [row["implementation"] for row in rows] == [first, COLD, KNOWN, LISTED]
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["rounds"] == 2 and row["processor"]
    # Nothing is known of the files at first; then all is, and then there is a list of them.
    assert asked == [["False"], ["True"], ["--labels", "True"]] * 2
    assert "left out" in (said := capsys.readouterr().out) and "a_module_that_is_absent" in said


@pytest.mark.parametrize("killed", [False, True])
def test_a_bad_import_is_told_and_the_others_are_not(
    killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {
        "good": "import json; found = through = json",
        "exits": "raise SystemExit('first line\\nnot with this version')",
        "exits well": "raise SystemExit",
        "absent": "import a_module_that_is_absent",
        "prints": "import atexit; atexit.register(print, 'bye'); print('{')",
    }
    if killed:
        # Of the process that has all too.
        codes = {"kills": "import os; os._exit(3)", **codes}
    monkeypatch.setattr(startup, "IMPORTS", codes)
    found = failures(tmp_path)
    assert list(found) == list(codes) and found.pop("kills", "") == ("python ended with status 3" if killed else "")
    assert found == {
        "good": "",
        "exits": "not with this version",
        "exits well": "python ended with status 0",
        "absent": "ModuleNotFoundError: No module named 'a_module_that_is_absent'",
        "prints": "",
    }


@pytest.mark.system
def test_a_real_run_has_a_first_step(tmp_path: Path) -> None:
    startup.draw(tmp_path / "images", 40)
    first_step("--data", str(tmp_path / "images"), cache=tmp_path / "cache", limit=120)
    assert any((tmp_path / "cache").iterdir())
