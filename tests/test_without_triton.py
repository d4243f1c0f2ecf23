"""The tests themselves where Triton is not installed, as on platforms for which it is not made. `make test-system`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[1]
# As good as not installed: neither import nor find_spec finds it.
PROGRAM = "import sys; sys.modules['triton'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_all_that_does_without_it_is_collected_and_the_rest_is_named() -> None:
    done = run("--collect-only", "-q")
    assert done.returncode == 0, done.stdout
    assert "Triton is not installed, so left out: test_triton_*.py" in done.stdout
    assert "tests/test_infonce.py::" in done.stdout and "tests/test_triton" not in done.stdout


def test_doctor_says_that_it_is_missing() -> None:
    done = run("-q", "tests/test_doctor.py")
    assert done.returncode == 0, done.stdout
