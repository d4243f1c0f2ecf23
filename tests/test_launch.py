"""The GPU kernels' division of work, played on the CPU: blocks, threads, packs and tables, in bounds and to the bit."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def play(program: Path, sources: list[str], *options: str) -> None:
    """Compiles and runs a program that exits with a message at the first difference."""
    paths = [str(ROOT / source) for source in sources]
    options = ("-std=c++17", "-O1", "-ffp-contract=off", "-fsanitize=address,undefined", "-pthread", *options)
    command = ["g++", *options, "-fno-sanitize-recover=undefined", f"-I{ROOT / 'csrc'}", *paths, "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr


@pytest.mark.system
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_every_block_and_thread_does_its_part(tmp_path: Path) -> None:
    # One baseline copy of the loops: the sanitizers do not go with instruction sets chosen at load time.
    play(
        tmp_path / "launch",
        ["tests/launch.cpp", "csrc/ema.cpp", "csrc/sgd_ema.cpp"],
        "-Dtarget_clones(...)=",
    )


@pytest.mark.system
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_every_step_of_the_views_does_its_part(tmp_path: Path) -> None:
    """The kernels' and the CPU's loops in every instruction set, none of them out of bounds."""
    sources = [f"csrc/{path.name}" for path in sorted((ROOT / "csrc").glob("views*.cpp"))]
    play(tmp_path / "launch_views", ["tests/launch_views.cpp", *sources])
