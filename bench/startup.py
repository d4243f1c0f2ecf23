"""How long does it take until training trains: imports, and from the command to the end of the first step?"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.command import start
from bench.photographs import draw_photographs
from bench.timing import environment, interleaved, quantiles, save
from fastmoco.errors import UserError

# What a loop with each of them needs, in a process of its own; both import torch and torchvision themselves.
IMPORTS = {
    "import torch": "import torch",
    "import lightly: data, loss, modules, transforms": "import lightly.data, lightly.loss, lightly.models.modules, "
    "lightly.transforms",
    "import fastmoco: all that a run needs": "import fastmoco.train.pretrain",
}
COLD = "first step, files not seen before"
KNOWN = "first step, files checked before"
LISTED = "first step, --labels manifest.csv"
WHAT = (*IMPORTS, COLD, KNOWN, LISTED)
# A run whose first step is over in well under a second.
OPTIONS = ("--arch", "resnet18", "--size", "64", "--batch-size", "32", "--queue-size", "1024", "--log-every", "1")
DISTINCT = 32


@dataclass(kw_only=True)
class StartupArgs:
    """Time imports, and `fastmoco pretrain` until its first step is in metrics.jsonl, in fresh processes, by turns."""

    images: int = 2000
    """JPEGs of 256 pixels to list."""
    rounds: int = 3
    """Times that each is timed."""
    limit: float = 120.0
    """Seconds after which a first step is given up."""
    out: Path | None = None
    """Markdown file to write; the rows are put beside it as JSON."""


def draw(folder: Path, count: int) -> None:
    """`count` files of which some are copies: what is timed is finding and checking them, not their content."""
    draw_photographs(folder, min(count, DISTINCT), 256)
    for i in range(DISTINCT, count):
        shutil.copyfile(folder / f"{i % DISTINCT:04d}.jpg", folder / f"{i:06d}.jpg")


def run(*command: str, cache: Path) -> str:
    """What a command of Python's prints. Raises UserError where it fails."""
    done = _python(*command, cache=cache)
    if done.returncode:
        raise UserError(f"python {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _python(*command: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env=_environment(cache), capture_output=True, text=True)


def failures(cache: Path) -> dict[str, str]:
    """Of each of `IMPORTS` why it fails here, in a line; empty where it does not. All in one process, as each brings
    much of the others; what did not get through there is tried alone."""
    with tempfile.TemporaryDirectory() as folder:
        # In a file: libraries print, some only as they end.
        through = Path(folder, "through.json")
        code = (
            "import json, pathlib\n"
            "through = []\n"
            f"for name, code in {IMPORTS!r}.items():\n"
            "    try:\n"
            "        exec(code, {})\n"
            "        through.append(name)\n"
            "    except BaseException:\n"
            "        pass\n"
            f"pathlib.Path({str(through)!r}).write_text(json.dumps(through))\n"
        )
        _python("-c", code, cache=cache)
        whole = json.loads(through.read_text()) if through.exists() else []
    return {name: "" if name in whole else _failure(code, cache) for name, code in IMPORTS.items()}


def _failure(code: str, cache: Path) -> str:
    """Why `code` does not get to its end in a process of its own, in a line; empty where it does."""
    with tempfile.TemporaryDirectory() as folder:
        ended = Path(folder, "ended")
        done = _python("-c", f"{code}\nopen({str(ended)!r}, 'w').close()", cache=cache)
        if ended.exists() and not done.returncode:
            return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"python ended with status {done.returncode}"


def first_step(*options: str, cache: Path, limit: float) -> None:
    """Start a run and end it when its first step is written. Raises UserError where none is within `limit` seconds."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "fastmoco", "pretrain", "mocov2-small", "--out", out, *OPTIONS, *options]
        log, metrics = Path(out, "log"), Path(out, "metrics.jsonl")
        ends = time.monotonic() + limit
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, env=_environment(cache), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while not (metrics.is_file() and b"\n" in metrics.read_bytes()):
                    if process.poll() is not None or time.monotonic() > ends:
                        raise UserError(f"{' '.join(command[1:])}: no step after {limit:g} s:\n{log.read_text()}")
                    time.sleep(0.005)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def launches(images: Path, folder: Path, limit: float) -> dict[str, Callable[[], None]]:
    """What is timed of the command; the files are checked once before."""
    manifest, cache = folder / "manifest.csv", folder / "cache"
    run("-m", "fastmoco", "data", "scan", str(images), "--out", str(manifest), cache=cache)

    def cold() -> None:
        with tempfile.TemporaryDirectory() as empty:
            first_step("--data", str(images), cache=Path(empty), limit=limit)

    return {
        COLD: cold,
        KNOWN: lambda: first_step("--data", str(images), cache=cache, limit=limit),
        LISTED: lambda: first_step("--data", str(images), "--labels", str(manifest), cache=cache, limit=limit),
    }


def _environment(cache: Path) -> dict[str, str]:
    return os.environ | {"XDG_CACHE_HOME": str(cache)}


def main(args: StartupArgs) -> int:
    """Run the benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        images, cache = Path(folder, "images"), Path(folder, "cache")
        draw(images, args.images)
        runs: dict[str, Callable[[], object]] = {}
        # None of this is timed, so both at once.
        with ThreadPoolExecutor() as pool:
            importing = pool.submit(failures, cache)
            launched = launches(images, Path(folder), args.limit)
        for name, failure in importing.result().items():
            if failure:
                print(f"{name}: left out, {failure}")
                continue
            runs[name] = lambda code=IMPORTS[name]: run("-c", code, cache=cache)  # type: ignore[misc]
        runs |= launched
        # The libraries' files are in the system's cache by now: all have been imported.
        seconds = interleaved(runs, rounds=args.rounds, warmup=0)
    rows: list[dict[str, Any]] = []
    for name, samples in seconds.items():
        row: dict[str, Any] = {"op": "startup", "implementation": name, "images": args.images, "rounds": args.rounds}
        rows.append(row | quantiles(samples) | environment())
        print(f"{name}: {rows[-1]['p50_ms'] / 1e3:.2f} s")
    if args.out is not None:
        save(
            rows,
            args.out,
            title=f"Start-up, {args.images:,} JPEGs of 256 px",
            command=f"python -m bench.startup --images {args.images} --rounds {args.rounds}",
            columns=["implementation", "p20_ms", "p50_ms", "p80_ms"],
            note=f"Medians of fresh processes, by turns, with all files in the system's cache. First steps: from the "
            f"command to the first row of metrics.jsonl, `fastmoco pretrain mocov2-small {' '.join(OPTIONS)}`.",
        )
    return 0


if __name__ == "__main__":
    start(main, StartupArgs, "startup")
