"""What share of what this machine can do does each operation reach? Ours alone, at the sizes of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench import crosscorr, ema, infonce, pooled_mse
from bench.harness import Benchmark, run_case
from bench.roofline import measure, share
from bench.timing import cell

BENCHMARKS = (infonce.BENCH, crosscorr.BENCH, pooled_mse.BENCH, ema.EMA, ema.STEP)
Row = dict[str, Any]


def report(benchmarks: Sequence[Benchmark] = BENCHMARKS, seconds: float = 0.5) -> int:
    """Measure for about `seconds` a case, print the table; 1 where an operation has no time, as when it is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = measure(device)
    lines: list[list[str]] = []
    for bench in benchmarks:
        own = {name: provider for name, provider in bench.providers.items() if name.startswith("fastmoco")}
        for case in bench.headline:
            rows = run_case(replace(bench, providers=own), case, device, machine, seconds)
            row = chosen(rows) or rows[0]
            figures = (row["p50_ms"], row["floor_ms"], share(row["floor_ms"], row["p50_ms"]))
            lines.append([bench.op, str(case), *map(cell, figures), row["bound"]])
    print(f"\nmeasured on {device}: {machine}")
    for first, second, *rest in (["operation", "sizes", "ms", "floor ms", "share %", "bound by"], *lines):
        print(first.ljust(11), second.ljust(62), *(text.rjust(10) for text in rest))
    return int(any(line[2] == "-" for line in lines))


def chosen(rows: Sequence[Row]) -> Row | None:
    """Of one case's rows that of the implementation which training has: the compiled ones before torch's."""
    timed = [row for row in rows if row.get("p50_ms") and str(row["implementation"]).startswith("fastmoco")]
    return min(timed, key=lambda row: row["implementation"] == "fastmoco reference", default=None)
