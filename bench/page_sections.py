"""What stands on the page of all benchmarks, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench import page_lines
from bench.page_lines import Results
from bench.parity import LIMIT


@dataclass(frozen=True)
class Section:
    """A part of the page: what `files` say, in a table with `headings`; `lines` makes its cells."""

    title: str
    files: tuple[str, ...]
    text: str
    headings: tuple[str, ...]
    lines: Callable[[Results], Iterable[Sequence[object]]]


SECTIONS = (
    Section(
        "Parity",
        ("parity",),
        "The operations on the same float32 inputs as the peers' own: largest differences, as shares of the largest "
        "number expected; and how far both are from the peer's formula in float64, there and where views are alike, "
        "for which the peers' own rounding is larger. `make bench` stops where one does not hold. Every other "
        "benchmark holds what it times to its definition too, and shows no speed of what disagrees.",
        ("beside", "comparisons", "in value", "in gradient", "ours from float64", "theirs", f"all within {LIMIT:g}"),
        page_lines.parity,
    ),
    Section(
        "Operations",
        page_lines.OPERATIONS,
        "Loss and all gradients, or the update: milliseconds, and times as fast as the paper's form in eager torch, as "
        "lightly's, and as the fastest form that torch alone gives.",
        ("operation", "sizes", "ms", "paper's form", "lightly", "torch's own"),
        page_lines.speeds,
    ),
    Section(
        "Memory of the operations",
        page_lines.OPERATIONS,
        "MB at the peak beyond the inputs, by torch's allocator or the resident set, whichever has more.",
        ("operation", "sizes", "MB", "paper's form, MB", "lightly, MB"),
        page_lines.bytes_needed,
    ),
    Section(
        "Share of the roofline",
        page_lines.OPERATIONS,
        "The floor is the slower of the fewest bytes at the rate of a copy and the products at the rate of large "
        "square ones, to which on CPUs the exponentials are added at their own rate, all measured in the same run; the "
        "share is the floor's of the time. A copy counts as read and write of two places, so it is above 100 where "
        "data stays in a cache, is updated in place or is read more than written. `python -m bench.roofline` measures "
        "this alone.",
        ("operation", "sizes", "floor, ms", "ms", "share, %", "bound by"),
        page_lines.shares,
    ),
    Section(
        "What the machine can do",
        page_lines.OPERATIONS,
        "The rates that these floors are from.",
        ("measured", "products float32, GFLOP/s", "products bfloat16, GFLOP/s", "copy, GB/s", "exponentials, G/s"),
        page_lines.rates,
    ),
    Section(
        "Views",
        ("views",),
        "A view on one thread beside torchvision's transforms of float32 tensors, and the largest error in 255ths.",
        ("recipe", "ms", "torchvision, ms", "times as fast", "largest error"),
        page_lines.views,
    ),
    Section(
        "Loading",
        ("data",),
        "Pairs of MoCo v2's views of 224 pixels from JPEGs of 512: times as fast as torchvision's transforms of PIL "
        "images, processor time and memory with all workers, seconds to the first batch. The weights of torchvision's "
        "blur are in part denormal, which some processors multiply a hundred times as slowly; with denormals flushed, "
        "which nobody's example does, its speed is a row of its own.",
        ("loader", "pairs/s", "torchvision, PIL", "CPU ms a pair", "MB", "first batch, s"),
        page_lines.loading,
    ),
    Section(
        "A training step",
        ("step",),
        "Both forwards, backward, SGD, moving average and queue of the paper's Barlow method, ResNet-50 at 64 pixels; "
        "the paper's in float32 as its code has it, ours in bfloat16 where the processor has it, and in float32 beside "
        "it.",
        ("step", "ms", "pairs/s", "times as fast", "first loss off by"),
        page_lines.step,
    ),
    Section(
        "From files to updated weights: speed, processor time and memory",
        ("e2e",),
        "Loader and training at work at once: times as fast as an eager reference, the paper's step fed by "
        "torchvision's PIL pipeline, as the same with denormals flushed, and as lightly's example; processor time and "
        "memory of each with all that it started. fastmoco trains channels-last in bfloat16 where the processor has "
        "it, the others in float32 as their examples do. The eager reference is slow here in part for denormal weights "
        "of torchvision's blur: the ratio to it with denormals flushed stands beside, targets are to it as it is used.",
        ("encoder", "implementation", "pairs/s", "eager", "eager, flushed", "lightly", "CPU ms a pair", "MB"),
        page_lines.end_to_end,
    ),
    Section(
        "lightly's loop with our parts",
        ("dropin",),
        "lightly's own MoCo loop, as it is and with a few lines changed ([adapters](../../docs/adapters.md)): float32, "
        "but bfloat16 with our arithmetic where the processor has it.",
        ("loop", "pairs/s", "times as fast"),
        page_lines.drop_in,
    ),
    Section(
        "Start-up",
        ("startup",),
        "Seconds in a fresh process, files in the system's cache.",
        ("what", "s"),
        page_lines.start_up,
    ),
    Section(
        "Sharing a step out",
        ("scaling",),
        "Processes on one machine, one thread each: shared steps and steps alone in turn, all at the same time; the "
        "difference is what a step takes outside its computing. More processes than cores cannot be faster.",
        ("processes", "shared, ms", "alone, ms", "outside, ms", "sent by each, MB"),
        page_lines.scaling,
    ),
)
