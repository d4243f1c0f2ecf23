"""`make gpu`'s runner, with other commands than those that need a GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu

ROOT = Path(__file__).resolve().parents[1]


def step(name: str, code: str, limit: float = 30.0, **environment: str) -> gpu.Step:
    return gpu.Step(name, [sys.executable, "-c", code], limit, environment)


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *steps: gpu.Step) -> tuple[int, list[dict], str]:
    monkeypatch.setattr(gpu, "missing", lambda: "")
    monkeypatch.setattr(gpu, "steps", lambda out: list(steps))
    status = gpu.main(["--out", str(out)])
    return status, json.loads((out / "summary.json").read_text()), (out / "summary.md").read_text()


def test_all_that_passes_is_summed_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "ema.md"
    bench = step("ema", f"open({str(table)!r}, 'w').write('# How fast\\n\\n| op | p50_ms |\\n')")
    built = step("build", "import os; print(os.environ['FASTMOCO_CUDA'], os.getcwd())", FASTMOCO_CUDA="1")
    status, outcomes, page = run(monkeypatch, tmp_path, built, step("tests", "print('9 passed')"), bench)
    assert status == 0 and [o["status"] for o in outcomes] == ["passed"] * 3
    assert (tmp_path / "build.log").read_text().split() == ["1", str(ROOT)]
    assert "9 passed" in page and "## How fast" in page and "| op | p50_ms |" in page


def test_a_failure_is_shown_and_the_rest_still_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = step("tests", "import sys; print('what went wrong'); sys.exit(3)"), step("ema", "print('timed')")
    status, outcomes, page = run(monkeypatch, tmp_path, *steps)
    assert status == 1 and [o["status"] for o in outcomes] == ["failed (3)", "passed"]
    assert "what went wrong" in page and "timed" not in page


def test_what_takes_too_long_is_ended_with_all_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    late = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    began = time.monotonic()
    status, outcomes, _ = run(monkeypatch, tmp_path, step("tests", code, limit=0.8), step("ema", "pass"))
    assert status == 1 and outcomes[0]["status"].startswith("timed out") and outcomes[1]["status"] == "passed"
    assert time.monotonic() - began < 30
    time.sleep(2.5)
    assert not late.exists(), "the child went on"


def test_the_deadline_is_of_all_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "DEADLINE", 0.0)
    status, outcomes, _ = run(monkeypatch, tmp_path, step("tests", "import time; time.sleep(60)"))
    assert status == 1 and outcomes[0]["seconds"] < 30


def test_the_limits_leave_nine_minutes_enough(tmp_path: Path) -> None:
    first, *middle, last = gpu.steps(tmp_path)
    assert first.environment == {"FASTMOCO_CUDA": "1"}
    assert sum(step.limit for step in (first, *middle)) <= gpu.DEADLINE < 9 * 60
    assert any(word.endswith("test_triton_infonce.py") for word in last.command)


def test_where_it_cannot_run_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "a_package_that_is_absent"))
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "lacks a_package_that_is_absent" in line and "PYTHON=" in line and not (tmp_path / "out").exists()
    monkeypatch.setattr(gpu, "NEEDED", ("torch",))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sees no GPU here" in line


def test_it_starts_where_nothing_is_installed() -> None:
    """Neither torch nor numpy is imported before their absence can be named."""
    code = "import sys, bench.gpu; sys.exit(bool({'torch', 'numpy', 'pytest'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
