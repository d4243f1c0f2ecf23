"""All benchmarks one after the other, parity first, each in a process of its own; then the page that shows them.

Run by `make bench` (--out build/bench) and `make bench-full`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import page
from bench.command import start
from bench.gpu import Outcome, Step, run
from bench.photographs import COUNT, SIDE, draw_photographs
from fastmoco.atomic import write_text

# Stands for a folder of generated images in a part's options.
IMAGES = "IMAGES"
# How long each part took, for the next run to tell how far it is.
RECORD = Path("logs", "suite.json")
# A machine that is busy with other work takes longer; one that takes so many times as long measures nothing.
PATIENCE = 10.0
# What is said of `make bench`, in seconds.
PROMISED = 600.0


@dataclass(frozen=True)
class Part:
    """A benchmark's module, its options for ten minutes of all and at full length, and about how long it takes.

    seconds: on two cores that do nothing else. needs: packages without which it is left out.
    """

    name: str
    few: str
    full: str
    seconds: tuple[float, float]
    needs: tuple[str, ...] = ()

    def options(self, *, full: bool) -> list[str]:
        """Those of one of both, word by word."""
        return (self.full if full else self.few).split()


PARTS = (
    Part("parity", "", "", (6, 5)),
    Part("infonce", "--device cpu --headline --seconds 1", "--device cpu --seconds 2", (34, 110)),
    Part("crosscorr", "--device cpu --headline --seconds 1", "--device cpu --seconds 2", (44, 110)),
    Part("pooled_mse", "--device cpu --headline --seconds 0.5", "--device cpu --seconds 2", (18, 50)),
    Part("ema", "--device cpu --seconds 1", "--device cpu --seconds 2", (14, 20)),
    Part("views", "--drawn 4 --rounds 3", "", (20, 300)),
    Part(
        "data",
        f"--generated {IMAGES} --sets 1 --seconds 0.5 --rounds 2",
        f"--generated {IMAGES} --seconds 1.5 --rounds 4",
        (65, 400),
    ),
    Part("step", "--rounds 3", "", (42, 60)),
    Part("e2e", f"--generated {IMAGES} --sizes 64 --seconds 0.5 --rounds 2", f"--generated {IMAGES}", (99, 620)),
    Part("dropin", f"--data {IMAGES} --turns 2 --steps 4", f"--data {IMAGES}", (73, 80), needs=("lightly",)),
    Part("scaling", "--rounds 2", "", (40, 200)),
    Part("startup", "--images 1000 --rounds 2", "--rounds 5", (65, 150)),
)


@dataclass(kw_only=True)
class SuiteArgs:
    """Run every benchmark, then write the page; exit status 1 where one failed or the page's layout is another."""

    full: bool = False
    """All sizes and repeats, some half an hour; without it about ten minutes on two cores."""
    out: Path = Path("build/bench")
    """Folder for the results, the page (README.md) and what each part printed (logs)."""
    parts: tuple[str, ...] = ()
    """Only these, and parity before them; all if not given."""


def expected(parts: Sequence[Part], out: Path, *, full: bool) -> dict[str, float]:
    """Seconds that each part will take: as long as it took in `out` before, else as its `seconds` say."""
    known = {row["step"]: row["seconds"] for row in recorded(out) if row["full"] == full and row["status"] == "passed"}
    return {part.name: known.get(part.name, part.seconds[full]) for part in parts}


def recorded(out: Path) -> list[dict[str, Any]]:
    """How the parts of earlier runs in `out` ended, and after how many seconds."""
    rows: list[dict[str, Any]] = json.loads(text) if (text := _text(out / RECORD)) else []
    return rows


def record(out: Path, outcome: Outcome, *, full: bool) -> None:
    """Keep how a part ended, in place of what is known of it."""
    others = [row for row in recorded(out) if (row["step"], row["full"]) != (outcome.step, full)]
    write_text(out / RECORD, json.dumps([*others, asdict(outcome) | {"full": full}]) + "\n")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def step(part: Part, out: Path, images: Path, *, full: bool) -> Step:
    """The command of a part; nothing that it finds out about files is kept in the user's cache."""
    options = [str(images) if option == IMAGES else option for option in part.options(full=full)]
    command = [sys.executable, "-m", f"bench.{part.name}", *options, "--out", str(out / f"{part.name}.md")]
    return Step(part.name, command, PATIENCE * part.seconds[full], {"XDG_CACHE_HOME": str(images.parent / "cache")})


def minutes(seconds: float) -> str:
    """For people."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def measure(parts: Sequence[Part], out: Path, *, full: bool) -> list[Outcome]:
    """Run the parts in turn, telling how far it is; no other after parity where that fails."""
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    ahead = expected(parts, out, full=full)
    outcomes: list[Outcome] = []
    began = time.monotonic()
    planned = 0.0
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        for number, part in enumerate(parts, 1):
            spent = time.monotonic() - began
            left = sum(ahead[later.name] for later in parts[number - 1 :])
            # What is slower than expected goes on being so.
            left *= max(1.0, spent / planned) if planned else 1.0
            planned += ahead[part.name]
            where = f"[{number}/{len(parts)}] {part.name}"
            print(f"{where} ... {minutes(spent)} so far, about {minutes(left)} to go", flush=True)
            if IMAGES in part.options(full=full) and not images.exists():
                draw_photographs(images, COUNT, SIDE)
            # What an earlier run left is not to be taken for what this one measured.
            for suffix in (".json", ".md", ".png"):
                (out / f"{part.name}{suffix}").unlink(missing_ok=True)
            job = step(part, out, images, full=full)
            outcome = run(job, logs, job.limit)
            outcomes.append(outcome)
            print(f"{where}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
            if outcome.status != "passed":
                print("\n".join(f"    {line}" for line in _text(logs / outcome.log).splitlines()[-15:]))
                if part.name == "parity":
                    break
            record(out, outcome, full=full)
    return outcomes


def chosen(names: Sequence[str]) -> list[Part]:
    """The parts of these names, or all, parity first; what lacks a package is left out, and that is said."""
    parts = []
    for part in PARTS:
        absent = [name for name in part.needs if importlib.util.find_spec(name) is None]
        if names and part.name not in ("parity", *names):
            continue
        if absent:
            print(f"{part.name}: left out, {', '.join(absent)} is not installed")
            continue
        parts.append(part)
    return parts


def total(seconds: float, *, full: bool) -> str:
    """How long all took, what lies between the parts too, and whether that is longer than is said of it."""
    said = f"measured in {minutes(seconds)}"
    if full or seconds <= PROMISED:
        return said
    return f"{said}: LONGER than the {PROMISED / 60:.0f} minutes that it should take; is the machine busy?"


def older(outcomes: Sequence[Outcome], out: Path) -> list[str]:
    """The parts whose results in `out` are of an earlier run, as this one left them out."""
    measured = {outcome.step for outcome in outcomes}
    return [part.name for part in PARTS if part.name not in measured and (out / f"{part.name}.json").is_file()]


def main(args: SuiteArgs) -> int:
    """Run the suite."""
    unknown = set(args.parts) - {part.name for part in PARTS}
    if unknown:
        print(f"--parts: no benchmark {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in PARTS)}")
        return 2
    out = args.out.resolve()
    began = time.monotonic()
    outcomes = measure(chosen(args.parts), out, full=args.full)
    failed = [outcome.step for outcome in outcomes if outcome.status != "passed"]
    if "parity" in failed:
        print(f"parity FAILED, so no speed is shown: {out / 'logs' / 'parity.log'}")
        return 1
    different = page.main(page.PageArgs(results=out))
    print(total(time.monotonic() - began, full=args.full))
    if names := older(outcomes, out):
        print(f"of an earlier run, not measured now: {', '.join(names)}")
    for name in failed:
        print(f"FAILED {name}: {out / 'logs' / f'{name}.log'}")
    return int(bool(failed or different))


if __name__ == "__main__":
    start(main, SuiteArgs, "suite")
