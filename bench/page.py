"""Writes the page of all benchmarks, and the short table in README.md, from their JSON files: no figure is typed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.command import start
from bench.page_lines import HEADLINE_FILES, OPERATIONS, Results, Row, headline
from bench.page_sections import SECTIONS, Section
from bench.timing import cell
from fastmoco.atomic import write_text
from fastmoco.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "docs" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- bench -->", "<!-- end -->"
RAN = "Ran on: "

INTRODUCTION = """# Benchmarks

Written by `python -m bench.page` from the JSON files beside it; no figure is typed. `make bench` measures all of it but
the ways from files to weights with views of 224 pixels, in about ten minutes on two cores that do nothing else and with
fewer repeats; `make bench-full` measures every size. Both write this page anew beside what they measured
(`build/bench`, `build/bench-full`), and fail where it is laid out in another way than the committed one (docs/results).
A dash is what was not measured. Ranges are the 20th and the 80th percentile of repeats that alternate; every row of the
JSON files has its own, with processor, threads, load and versions.

    python -m bench.check OLD NEW [--common]          # two folders or files: what is slower, beyond the noise of both
    python -m bench.suite --full --out docs/results   # measures what is committed
"""

MORE = """## More results

- [demo](../../docs/results/demo.md): the demo with three seeds.
- [The paper's study](../../docs/results/study/report/report.md) on tissue, fundus photographs and X-rays, three seeds;
  [what matters on small sets](../../docs/results/search.md), with what did not help.
- [foreign](../../docs/results/foreign.md): checkpoints written by eight libraries' own code, read here, and ours there;
  dropin_curves: the losses of lightly's loop and of ours, [ResNet-18](../../docs/results/dropin_curves.md) with our
  arithmetic in bfloat16, [ResNet-50](../../docs/results/dropin_curves_resnet50.md) in float32.
- [e2e_float32](../../docs/results/e2e_float32.md): from files to weights at 64 px on a processor without bfloat16,
  where fastmoco trains in float32 too; [e2e_avx512_bf16](../../docs/results/e2e_avx512_bf16.md): on one that has
  bfloat16 in vectors, not in tiles.
- [objectives](../../docs/results/objectives.md): what each objective learns on tissue patches, beside random weights.
- [engines](../../docs/results/engines.md): two processes beside one on real images, under DDP and ZeRO 0 to 3.
- [plan](../../docs/results/plan.md): the plan's formulas beside published runs on 8 to 2,528 GPUs.
- [One H100](../../docs/results/gpu): the operations, the step and the views, and the plan beside them
  ([planned](../../docs/results/gpu/planned.md)); summed up in [kernels](../../docs/kernels.md#on-an-h100).
- [coverage](../../docs/results/coverage.md): how much of the code the tests run.
"""

# Benchmarks that draw a picture beside their table.
PLOTTED = (*OPERATIONS, "data", "e2e")

_NUMBER = r"-?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|inf|nan)"
_FIGURE = re.compile(rf"(?:-|yes|no|memory|arithmetic|{_NUMBER}(?: \({_NUMBER} to {_NUMBER}\))?)")


@dataclass(kw_only=True)
class PageArgs:
    """Write the page of a folder of results; of docs/results also README's table, of another compare with it."""

    results: Path = COMMITTED
    """Folder with the JSON files of the benchmarks; README.md in it is the page."""
    check: bool = False
    """Write nothing; exit status 1 where page or table are not what the JSON files give."""


def page(results: Results) -> str:
    """The whole page."""
    parts = [INTRODUCTION, *(section_text(section, results) for section in SECTIONS), MORE]
    return "\n".join(parts)


def section_text(section: Section, results: Results) -> str:
    """A title, what was asked, the links to all that was measured, the table, and where it was measured."""
    links = ", ".join(f"[{name}]({name}.md)" + f" ([plot]({name}.png))" * (name in PLOTTED) for name in section.files)
    rows = [row for name in section.files for row in results.rows(name)]
    lines = [f"## {section.title}", "", f"{section.text} All of it: {links}.", ""]
    return "\n".join([*lines, *table(section.headings, section.lines(results)), "", machine(rows), ""])


def table(headings: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    """Markdown, with a dash for None."""
    cells = [list(headings), *([cell(value) for value in line] for line in lines)]
    rows = ["| " + " | ".join(line) + " |" for line in cells]
    return [rows[0], "|" + "---|" * len(headings), *rows[1:]]


def machine(rows: Sequence[Row]) -> str:
    """Where and when all of `rows` were measured."""
    if not any("time" in row for row in rows):
        return f"{RAN}{'not recorded' if rows else '-'}."
    known = [row for row in rows if "time" in row]

    def values(name: str) -> list[str]:
        return list(dict.fromkeys(str(row[name]) for row in known if name in row))

    loads = sorted(float(row["load_1min"]) for row in known)
    times = sorted(values("time"))
    parts = [*values("gpu"), *values("processor"), f"threads {' and '.join(values('threads'))}"]
    parts.append(f"load {_range([f'{load:g}' for load in loads])}")
    parts += [
        f"{name} {' and '.join(values(name))}" for name in ("python", "torch", "lightly", "fastmoco") if values(name)
    ]
    return f"{RAN}{', '.join(parts)}; {_range(times)}."


def _range(ordered: Sequence[str]) -> str:
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def block(results: Results) -> str:
    """README's table, markers included."""
    rows = [row for name in HEADLINE_FILES for row in results.rows(name)]
    headings = ("times as fast as", "the paper's form, torchvision", "with denormals flushed", "lightly")
    return "\n".join([BEGIN, *table(headings, headline(results)), "", machine(rows), END])


def with_block(text: str, new: str) -> str:
    """`text` with what stands between the markers replaced. Raises UserError where they are not there once."""
    if text.count(BEGIN) != 1 or END not in text.split(BEGIN)[1]:
        raise UserError(f"{README.name}: not one pair of the markers {BEGIN} and {END}; put them where the table goes")
    before, rest = text.split(BEGIN)
    return before + new + rest.split(END, 1)[1]


def masked(text: str) -> str:
    """`text` without what was measured: figures alone in a cell of a table, and the lines that name the machine."""
    return "\n".join(_masked_line(line) for line in text.split("\n"))


def _masked_line(line: str) -> str:
    if line.startswith(RAN):
        return RAN
    if not line.startswith("| "):
        return line
    cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
    return "| " + " | ".join("#" if _FIGURE.fullmatch(text) else text for text in cells) + " |"


def differences(expected: str, found: str, name: str) -> str:
    """A unified diff; empty where they are the same."""
    before, after = expected.splitlines(keepends=True), found.splitlines(keepends=True)
    return "".join(difflib.unified_diff(before, after, f"{name}, as committed", f"{name}, as measured", n=1))


def main(args: PageArgs) -> int:
    """Write or compare; 1 where something differs that should not."""
    results = Results(args.results)
    new = page(results)
    path = args.results / "README.md"
    readme = README.read_text(encoding="utf-8")
    missing = [name for name in dict.fromkeys(f for s in SECTIONS for f in s.files) if not results.rows(name)]
    if missing:
        print(f"not measured, so dashes: {', '.join(missing)}")
    updated = with_block(readme, block(results))
    if args.results.resolve() == COMMITTED:
        if args.check:
            different = differences(path.read_text(encoding="utf-8"), new, path.name)
            different += differences(readme, updated, README.name)
        else:
            different = ""
            write_text(path, new)
            write_text(README, updated)
    else:
        committed = (COMMITTED / "README.md").read_text(encoding="utf-8")
        different = differences(masked(committed), masked(new), path.name)
        different += differences(masked(readme), masked(updated), README.name)
        if not args.check:
            write_text(path, new)
        print(block(results))
    print(different or f"{path}: as it should be")
    return int(bool(different))


if __name__ == "__main__":
    start(main, PageArgs, "page")
