"""`make gpu`'s runner, with other commands than those that need a GPU."""

import json
import os
import signal
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
    monkeypatch.setattr(gpu, "missing", lambda: [])
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


def test_an_interrupt_ends_the_step_too(tmp_path: Path) -> None:
    """Ctrl-C reaches this process alone: the step has a session of its own."""
    began, late = tmp_path / "began", tmp_path / "late"
    code = f"import time; open({str(began)!r}, 'w'); time.sleep(3); open({str(late)!r}, 'w')"
    command = [sys.executable, "-c", code]
    # What a shell starts in the background is deaf to it.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from bench import gpu; from pathlib import Path; "
    program += f"gpu.run(gpu.Step('s', {command}, 9.0), Path('.'), 9.0)"
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **options) as runner:
        while not began.exists():
            assert runner.poll() is None
            time.sleep(0.02)
        runner.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in runner.communicate(timeout=20)[1]
    time.sleep(3.5)
    assert not late.exists(), "the step went on"


def test_where_it_cannot_run_it_says_why_a_line_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> list[str]:
        assert gpu.main(["--out", str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err.splitlines()

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "setuptools"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "77.0.3")
    (line,) = said()
    assert "sees no GPU here" in line

    monkeypatch.setattr(gpu, "NEEDED", ("torch", "setuptools", "a_package_that_is_absent"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "68.1.2")
    (tmp_path / "Python.h").unlink()
    nvcc.unlink()
    absent, setuptools, header, toolkit, _ = said()
    assert "lacks a_package_that_is_absent" in absent and "PYTHON=" in absent
    assert "setuptools 68.1.2 is too old" in setuptools and "Python.h is missing" in header and "no nvcc" in toolkit


def test_it_starts_where_nothing_is_installed() -> None:
    """Neither torch nor numpy is imported before their absence can be named."""
    code = "import sys, bench.gpu; sys.exit(bool({'torch', 'numpy', 'pytest'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
