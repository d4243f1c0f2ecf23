"""The GPU kernels' division of work, played on the CPU: blocks, threads, packs and tables, in bounds and to the bit."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_every_block_and_thread_does_its_part(tmp_path: Path) -> None:
    program = tmp_path / "launch"
    sources = [ROOT / "tests" / "launch.cpp", ROOT / "csrc" / "ema.cpp", ROOT / "csrc" / "sgd_ema.cpp"]
    # One baseline copy of the loops: the sanitizers do not go with instruction sets chosen at load time.
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-Dtarget_clones(...)=", "-fsanitize=address,undefined"]
    compiled = subprocess.run(
        ["g++", *options, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program)], capture_output=True, text=True
    )
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr
