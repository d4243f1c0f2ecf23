"""Everything that only a GPU shows, in one command and at most nine minutes: build, tests, benchmarks, one summary.

Run by `make gpu`, in a checkout with nothing installed of it: needs torch, Triton, numpy, pytest, pybind11, setuptools,
Python's headers and nvcc. Imports nothing but the standard library until it knows that they are there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "triton", "numpy", "pytest", "pybind11", "setuptools")
# Older ones refuse the licence as pyproject.toml gives it.
SETUPTOOLS = 77
BENCHMARKS = ("infonce", "crosscorr", "pooled_mse", "ema")
# Of all steps together, in seconds; each has its own limit too, within what is left.
DEADLINE = 520.0


@dataclass(frozen=True)
class Step:
    """A command with a limit in seconds; `environment` is added to this process's."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a step ended, after how many seconds, and the file with all that it printed."""

    step: str
    status: str
    seconds: float
    log: str


def missing() -> list[str]:
    """Why this cannot run here, one line a reason; none where it can."""
    reasons = []
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        reasons.append(f"{sys.executable} lacks {', '.join(absent)}; name another: make gpu PYTHON=/path/to/python3")
    if "setuptools" not in absent and int(metadata.version("setuptools").split(".")[0]) < SETUPTOOLS:
        reasons.append(f"setuptools {metadata.version('setuptools')} is too old, pyproject.toml needs {SETUPTOOLS}")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        reasons.append(f"{header} is missing: install the Python headers (Debian: apt install python3-dev)")
    # As setup.py looks for it.
    homes = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if not (shutil.which("nvcc") or any((home / "nvcc").is_file() for home in homes)):
        reasons.append("no nvcc on PATH or under CUDA_HOME: install the CUDA toolkit, or say where it is")
    if "torch" not in absent:
        reasons += _no_gpu()
    return reasons


def _no_gpu() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return [f"torch {torch.__version__}, built {built}, sees no GPU here"]
    return []


def steps(out: Path) -> list[Step]:
    """What runs, in order. All but the last have their time within the deadline; the last has what they leave."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "--durations=10", "--continue-on-collection-errors"]
    # These take the GPU where there is one. What the compiler makes of the kernels needs none, and minutes.
    triton = [str(path) for path in sorted(ROOT.glob("tests/test_triton_*.py")) if path.stem != "test_triton_aot"]

    def bench(name: str) -> Step:
        options = ["--device", "cuda", "--seconds", "0.6", "--out", str(out / f"{name}.md")]
        return Step(name, [python, "-m", f"bench.{name}", *options], 60.0)

    return [
        # A build without CUDA, on a machine that has a GPU, is a failure.
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 100.0, {"FASTMOCO_CUDA": "1"}),
        Step("tests", [*pytest, "-m", "gpu", "tests/gpu"], 180.0),
        *(bench(name) for name in BENCHMARKS),
        Step("triton", [*pytest, *triton], DEADLINE),
    ]


def run(step: Step, out: Path, limit: float) -> Outcome:
    """Runs `step`, its output in a file; it and all that it started are ended past `limit` seconds, or with this."""
    log = out / f"{step.name}.log"
    began = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            # Unbuffered: what was printed must survive the step's end.
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
            status = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = f"timed out after {limit:.0f} s"
        finally:
            # In a session of its own the step sees no Ctrl-C: whatever ends the wait has to end it.
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(step.name, status, round(time.monotonic() - began, 1), log.name)


def summary(outcomes: list[Outcome], out: Path) -> str:
    """One Markdown page: how each step ended, the end of what failed, and the benchmarks' tables."""
    lines = ["# GPU run", "", "| step | status | seconds | log |", "|---|---|---|---|"]
    lines += [f"| {o.step} | {o.status} | {o.seconds} | {o.log} |" for o in outcomes]
    for outcome in outcomes:
        log = (out / outcome.log).read_text(errors="replace").splitlines()
        if outcome.status != "passed" or outcome.step in ("tests", "triton"):
            shown = 40 if outcome.status != "passed" else 1
            lines += ["", f"## {outcome.step}: {outcome.status}", "", "```", *log[-shown:], "```"]
        table = out / f"{outcome.step}.md"
        if outcome.step in BENCHMARKS and table.is_file():
            lines += ["", "#" + table.read_text().rstrip()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run everything; status 1 where a step failed, 2 where this machine cannot run it."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for the results")
    args = parser.parse_args(argv)
    reasons = missing()
    for reason in reasons:
        print(f"make gpu: {reason}", file=sys.stderr)
    if reasons:
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    ends = time.monotonic() + DEADLINE
    for step in steps(out):
        print(f"{step.name} ...", flush=True)
        outcome = run(step, out, min(step.limit, max(1.0, ends - time.monotonic())))
        print(f"{step.name}: {outcome.status}, {outcome.seconds} s", flush=True)
        outcomes.append(outcome)
        # After every step, so that a run that is ended leaves what it has.
        (out / "summary.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
        (out / "summary.md").write_text(summary(outcomes, out))
    failed = [outcome.step for outcome in outcomes if outcome.status != "passed"]
    print(f"{out / 'summary.md'}: " + (f"FAILED {', '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
