"""How an operation is benchmarked: parity first, then interleaved timings of every provider that may be timed."""

from __future__ import annotations

import argparse
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.memory import peak_memory
from bench.plot import save_plot
from bench.roofline import Machine, Work, measure, share
from bench.timing import captured, cell, environment, interleaved, quantiles, save
from fastmoco.errors import UserError
from fastmoco.ops import dispatch

Outputs = Mapping[str, Tensor | Sequence[Tensor]]
Run = Callable[[], Outputs]

# By the dtype of what is given: an operation's own arithmetic is float32 at least. bfloat16 rounds by 4e-3.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


class Missing(Exception):
    """Why a provider is left out here."""


@dataclass(frozen=True)
class Case:
    """One problem: its sizes as they stand in a row, and the dtype of the large inputs."""

    sizes: dict[str, Any]
    dtype: str = "float32"

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.sizes.items()) + f", {self.dtype}"


@dataclass(frozen=True)
class Provider:
    """`build` takes a case's inputs and returns the run; `exact` False where the run is a bound, not the operation."""

    build: Callable[[Any], Run]
    exact: bool = True


@dataclass
class Benchmark:
    """An operation's cases, its oracle and its providers.

    prepare: the inputs of a case on a device, the same at every call; a provider may write to those it is given.
    headline: those of the cases that the page of all benchmarks shows.
    oracle: outputs by name, in float64, from such inputs. Every exact provider returns the same names.
    work: what the case has to move and multiply.
    baseline: the provider that ratios are against.
    tolerance: by dtype, the `relative_error` that an exact provider may have.
    """

    op: str
    baseline: str
    cases: Sequence[Case]
    quick: Sequence[Case]
    headline: Sequence[Case]
    prepare: Callable[[Case, str], Any]
    oracle: Callable[[Any], Outputs]
    work: Callable[[Case], Work]
    tolerance: Mapping[str, float] = field(default_factory=lambda: TOLERANCE)
    providers: dict[str, Provider] = field(default_factory=dict)

    def provider(self, name: str, *, exact: bool = True) -> Callable[[Callable[[Any], Run]], Callable[[Any], Run]]:
        """Registers the function that builds a run from inputs; it raises Missing where it cannot run."""

        def register(build: Callable[[Any], Run]) -> Callable[[Any], Run]:
            self.providers[name] = Provider(build, exact)
            return build

        return register

    def ours(self, build: Callable[[Any, str], Run], like: Callable[[Any], Tensor]) -> None:
        """Registers every implementation in this package; `build` also takes the implementation's name.

        like: a tensor of the inputs that says on which device they are.
        """
        for implementation in dispatch.PREFERENCE:

            def build_one(inputs: Any, implementation: str = implementation) -> Run:
                try:
                    dispatch.pick(self.op, like(inputs), implementation)
                except UserError as error:
                    # Without the list of the others that would do.
                    raise Missing(str(error).split(". On ")[0]) from error
                return build(inputs, implementation)

            self.providers[f"fastmoco {implementation}"] = Provider(build_one)


def relative_error(actual: Outputs, expected: Outputs) -> float:
    """The worst of the outputs, `|actual - expected| / |expected|` in float64; infinite where not finite or absent."""
    worst = 0.0
    for name, want in expected.items():
        wanted, got = ([value] if isinstance(value, Tensor) else value for value in (want, actual.get(name, ())))
        if [tensor.shape for tensor in got] != [tensor.shape for tensor in wanted]:
            return math.inf
        pairs = [(a.detach().double(), b.double()) for a, b in zip(got, wanted, strict=True)]
        error = math.hypot(*(float((a - b).norm()) for a, b in pairs))
        scale = math.hypot(*(float(b.norm()) for _, b in pairs))
        value = error / scale if scale > 0 else error
        worst = max(worst, value if math.isfinite(value) else math.inf)
    return worst


def run_case(bench: Benchmark, case: Case, device: str, machine: Machine, seconds: float) -> list[dict[str, Any]]:
    """A row for each provider that runs here; times only in those that agree with the oracle."""
    expected = bench.oracle(bench.prepare(case, device))
    tolerance = bench.tolerance[case.dtype]
    errors: dict[str, float | None] = {}
    failures: dict[str, str] = {}
    runs: dict[str, Run] = {}
    print(f"\n{bench.op}: {case}")
    for name, provider in bench.providers.items():
        try:
            run = provider.build(bench.prepare(case, device))
            # What a run returns may be its own state, which the next run changes: compared before that.
            outputs = run()
            errors[name] = relative_error(outputs, expected) if provider.exact else None
        except Missing as reason:
            print(f"  {name}: left out, {reason}")
            continue
        except Exception as exception:
            traceback.print_exc()
            failures[name] = f"{type(exception).__name__}: {exception}"
            errors[name] = math.inf
            print(f"  {name}: FAILED, {failures[name]}")
            continue
        error = errors[name]
        if error is None:
            print(f"  {name}: a bound, with no result to compare")
        elif error <= tolerance:
            print(f"  {name}: off by {error:.1e} (tolerance {tolerance:g})")
        else:
            failures[name] = f"off by {error:.1e}, tolerance {tolerance:g}"
            print(f"  {name}: PARITY FAILS, {failures[name]}: no speed is shown")
            continue
        runs[name] = run
    del expected
    timings = time_runs(runs, device, seconds)
    base = timings.get(bench.baseline, {}).get("p50_ms")
    floor, bound = machine.floor(bench.work(case))
    where = environment(device)
    rows = []
    for name, error in errors.items():
        measured = timings.get(name, dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "graph_p50_ms", "rounds")))
        memory = peak_memory(runs[name], device) if name in runs else {}
        rows.append(
            {"op": bench.op, "implementation": name, **case.sizes, "dtype": case.dtype, "pass": "forward + backward"}
            | measured
            | {"ratio": base / measured["p50_ms"] if base and measured["p50_ms"] else None}
            | {name: memory.get(name) for name in ("peak_bytes", "resident_bytes", "memory_method")}
            | {"floor_ms": floor * 1e3, "bound": bound, "share_percent": share(floor * 1e3, measured["p50_ms"])}
            | machine.rates()
            | {"error": error if error != math.inf else None}
            | {"tolerance": tolerance, "failure": failures.get(name)}
            | where
        )
    show(rows)
    return rows


def time_runs(runs: Mapping[str, Run], device: str, seconds: float) -> dict[str, dict[str, Any]]:
    """Quantiles of each run, interleaved for about `seconds`; on CUDA also those of its replay from a graph."""
    if not runs:
        return {}
    cuda = torch.device(device).type == "cuda"
    # On CPUs the run that was compared has warmed up; the first round, which says how many fit, is one of them.
    first = interleaved(runs, rounds=1, device=device, warmup=1 if cuda else 0)
    rounds = min(200, max(3, int(seconds / sum(values[0] for values in first.values()))))
    others = interleaved(runs, rounds=rounds - 1, device=device, warmup=0)
    timings: dict[str, dict[str, Any]] = {
        name: quantiles([*first[name], *values]) | {"graph_p50_ms": None, "rounds": rounds}
        for name, values in others.items()
    }
    if cuda:
        replays = {}
        for name, run in runs.items():
            try:
                replays[name] = captured(run)
            except Exception as error:  # of whatever kind: the times above stand
                print(f"  {name}: not captured in a CUDA graph: {error}")
        for name, values in interleaved(replays, rounds=rounds, device=device).items():
            timings[name]["graph_p50_ms"] = quantiles(values)["p50_ms"]
    return timings


def show(rows: list[dict[str, Any]]) -> None:
    """The rows of one case as a table on the terminal."""
    timed = [row for row in rows if row["p50_ms"] is not None]
    if not timed:
        return
    columns = ["implementation", "p20_ms", "p50_ms", "p80_ms", "ratio", "peak_bytes", "resident_bytes", "error"]
    if any(row["graph_p50_ms"] for row in timed):
        columns.insert(4, "graph_p50_ms")
    cells = [columns, *([cell(row[name]) for name in columns] for row in timed)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for first, *rest in cells:
        print("  " + first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)))
    print(f"  floor {timed[0]['floor_ms']:.3g} ms, bound by {timed[0]['bound']}")


def main(benchmarks: Sequence[Benchmark], module: str, question: str, argv: Sequence[str] | None = None) -> int:
    """Run `benchmarks` as `python -m bench.<module>`; status 1 where a provider failed, parity included."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{module}", description=question)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="small sizes, in seconds")
    which.add_argument("--headline", action="store_true", help="only the sizes that the page of all benchmarks shows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="of timing a case (4; with --quick 0.2)")
    parser.add_argument("--out", type=Path, help="Markdown file to write; .json and .png are put beside it")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")
    seconds = args.seconds or (0.2 if args.quick else 4.0)
    print(question)
    machine = measure(args.device)
    print(f"measured on {args.device}: {machine}")
    options = [option for option in ("quick", "headline") if getattr(args, option)]
    options += [f"device {args.device}"] + ([f"seconds {args.seconds:g}"] if args.seconds else [])
    command = " --".join([f"python -m bench.{module}", *options])
    rows: list[dict[str, Any]] = []
    for bench in benchmarks:
        for case in bench.quick if args.quick else bench.headline if args.headline else bench.cases:
            rows += run_case(bench, case, args.device, machine, seconds)
            if args.out is not None:
                # After every case, so that what was measured survives a crash of a later one.
                write(rows, args.out, title=question, command=command)
    if args.out is not None:
        print("\n" + save_plot(rows, args.out.with_suffix(".png"), title=question))
    failed = [f"{row['op']} {row['implementation']}: {row['failure']}" for row in rows if row["failure"]]
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


def write(rows: list[dict[str, Any]], out: Path, *, title: str, command: str) -> None:
    """The rows as Markdown and JSON; the columns are the sizes that any of them has, then what was measured."""
    known = {"op", "implementation", "dtype"}
    sizes = [name for row in rows for name in list(row)[: list(row).index("pass")] if name not in known]
    columns = ["op", *dict.fromkeys(sizes), "dtype", "implementation", "p20_ms", "p50_ms", "p80_ms", "graph_p50_ms"]
    columns += ["ratio", "floor_ms", "share_percent", "bound", "peak_bytes", "resident_bytes", "error", "failure"]
    shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
    save(rows, out, title=title, command=command, columns=shown)
