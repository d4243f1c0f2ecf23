"""What do the operations have to move and multiply, how long must that take, and how near to it are they here?

The one place of the formulas: the benchmarks' floors come from here too, with rates measured in the same run. Writes
the table of docs/kernels.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bench.shapes import STAGES, resnet50_shapes
from fastmoco.atomic import write_text

BEGIN, END = "<!-- python -m bench.roofline -->", "<!-- end -->"
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Work:
    """`bytes` read and written, `flops` of matrix products in `dtype`, exponentials, and kernel launches."""

    bytes: float
    flops: float = 0.0
    dtype: str = "float32"
    exponentials: float = 0.0
    launches: int = 1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates a second. `overlaps`: whether exponentials and matrix products run in different units."""

    bytes: float
    flops: dict[str, float]
    exponentials: float
    launch: float
    overlaps: bool

    def floor(self, work: Work) -> tuple[float, str]:
        """Seconds below which `work` cannot be done while its data is not in a cache, and what bounds it."""
        # Where narrow products are the slower ones, their numbers can be widened.
        rate = max(self.flops[work.dtype], self.flops["float32"])
        product, exponential = work.flops / rate, work.exponentials / self.exponentials
        arithmetic = max(product, exponential) if self.overlaps else product + exponential
        memory = work.bytes / self.bytes
        return max((memory, "memory"), (arithmetic, "arithmetic"))

    def rates(self) -> dict[str, float]:
        """The rates as a row has them: GFLOP/s of products by dtype, GB/s read and written by a copy, and 10^9
        exponentials a second, which of a GPU are its data sheet's."""
        products = {f"gemm_{dtype}_gflops": rate / 1e9 for dtype, rate in self.flops.items()}
        return products | {"copy_gb_s": self.bytes / 1e9, "exponentials_g_s": self.exponentials / 1e9}

    def __str__(self) -> str:
        products = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in self.flops.items())
        return f"products {products}; copy {self.bytes / 1e9:.1f} GB/s; exponentials {self.exponentials / 1e9:.2g} G/s"

    def predicted(self, work: Work) -> float:
        """Seconds at the floor, every launch after the one before."""
        return self.floor(work)[0] + work.launches * self.launch


def share(floor: float | None, measured: float | None) -> float | None:
    """The per cent of the time `measured` that the floor is; None of what was not measured.

    More than 100 where what is worked on stays in a cache, is written where it was read (a copy, which the rate is of,
    reads and writes at two places), or is read more than written: a copy does as much of both.
    """
    return 100 * floor / measured if floor and measured else None


# Data sheet: float32 as three TF32 products (495e12), which keep its accuracy and beat its own units (67e12); 132
# multiprocessors x 16 exponentials a clock at 1.83 GHz; a launch as kernels that follow each other see it.
H100 = Machine(
    bytes=3.35e12,
    flops={"bfloat16": 990e12, "float32": 495e12 / 3},
    exponentials=132 * 16 * 1.83e9,
    launch=3e-6,
    overlaps=True,
)


# Forward and all gradients, at the fewest bytes.


def infonce(n: int, k: int, d: int, dtype: str) -> Work:
    """The bank read once, two products; queries, keys and their gradients beside it.

    Launches: partial sums, their merge, the losses' mean, the gradient times that of the loss.
    """
    return Work(
        bytes=k * d * BYTES[dtype] + 4 * n * d * 4, flops=4 * n * k * d, dtype=dtype, exponentials=n * k, launches=4
    )


def infonce_eager(n: int, k: int, d: int, dtype: str) -> Work:
    """Clone (read, write), two products over it; thirteen passes over N x K: product, cat, division, log-softmax, and
    the backward of each."""
    return Work(
        bytes=k * d * (BYTES[dtype] + 3 * 4) + 13 * n * k * 4,
        flops=4 * n * k * d,
        exponentials=2 * n * k,
        launches=25,
    )


def crosscorr(stages: int, n: int, d: int, dtype: str) -> Work:
    """Two inputs read, two gradients written; products by the Gram matrices where N < 0.75 D, else by C.

    Launches: standardisation, three products (of C also its division and diagonal), two for the loss, the gradients
    through the standardisation, each times that of the loss and, where it is not float32, rounded to the input's dtype.
    """
    gram = n < 0.75 * d
    launches = 7 + (0 if gram else 2) + (2 if dtype == "float32" else 4)
    flops = 8 * n * n * d if gram else 6 * n * d * d
    return Work(bytes=4 * stages * n * d * BYTES[dtype], flops=stages * flops, launches=launches)


def crosscorr_eager(stages: int, n: int, d: int, dtype: str) -> Work:
    """C by itself: three products, and some twenty passes over D x D."""
    moved = 12 * n * d * BYTES[dtype] + 20 * d * d * 4
    return Work(bytes=stages * moved, flops=stages * 6 * n * d * d, launches=stages * 30)


def pooled_mse(n: int, channels: int, side: int, grid: int, dtype: str) -> Work:
    """Both maps read and one gradient written; the pooled difference in float32 is written and read.

    Launches: the difference, the sum of its squares, that over their number, the gradient.
    """
    pooled = n * channels * grid * grid * 4
    return Work(bytes=3 * n * channels * side * side * BYTES[dtype] + 2 * pooled, launches=4)


def pooled_mse_eager(n: int, channels: int, side: int, grid: int, dtype: str) -> Work:
    """Both maps read, a gradient cleared and written; ten passes over the pooled maps."""
    size = BYTES[dtype]
    return Work(bytes=4 * n * channels * side**2 * size + 10 * n * channels * grid**2 * size, launches=12)


def ema(numbers: int, tensors: int) -> Work:
    """float32: target read and written, source read."""
    return Work(bytes=12 * numbers)


def ema_eager(numbers: int, tensors: int) -> Work:
    """`k.copy_(m * k + (1 - m) * q)`: seven passes and three launches a tensor, as `lerp` is not used."""
    return Work(bytes=28 * numbers, launches=3 * tensors)


def sgd_ema(numbers: int, tensors: int) -> Work:
    """Gradient read; weight, momentum and average read and written."""
    return Work(bytes=28 * numbers)


def sgd_ema_library(numbers: int, tensors: int) -> Work:
    """`SGD(fused=True)` at 20 bytes a parameter, then `torch._foreach_lerp_` at 12; some 320 pointers a launch."""
    return Work(bytes=32 * numbers, launches=2 * max(1, tensors // 80))


def queue_push(n: int, d: int) -> Work:
    """Keys read, rows written; the pointer moves in a launch of its own, when all have read it."""
    return Work(bytes=2 * n * d * 4, launches=2)


def measure(device: str) -> Machine:
    """The rates of this machine: square matrix products, a copy of 128 MB (CUDA: 1 GB), `exp` within a cache."""
    cuda = torch.device(device).type == "cuda"
    side, numbers = (8192, 1 << 28) if cuda else (1024, 1 << 25)

    def rate(amount: float, run: Callable[[], object]) -> float:
        run()
        # The best of them: a floor is what the machine can do, not what it did while it was disturbed.
        return amount / min(_seconds(run, device) for _ in range(10))

    def products(dtype: torch.dtype) -> float:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return rate(2 * side**3, lambda: torch.mm(a, b, out=out))

    flops = {"float32": products(torch.float32), "bfloat16": products(torch.bfloat16)}
    if cuda:
        # Three TF32 products keep float32's accuracy; they may be faster than its own units.
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        flops["float32"] = max(flops["float32"], products(torch.float32) / 3)
        torch.set_float32_matmul_precision(precision)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    copied = rate(8 * numbers, lambda: target.copy_(source))
    # Small enough for a cache, large enough for all threads.
    small = torch.zeros(1 << (24 if cuda else 16), device=device)
    exponentials = rate(64 * small.numel(), lambda: [torch.exp(small, out=target[: small.numel()]) for _ in range(64)])
    return Machine(
        bytes=copied, flops=flops, exponentials=H100.exponentials if cuda else exponentials, launch=0.0, overlaps=cuda
    )


def _seconds(run: Callable[[], object], device: str) -> float:
    cuda = torch.device(device).type == "cuda"
    began = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def entries() -> list[tuple[str, str, Work, Work]]:
    """Operation, sizes, its work, and that of the eager form: the method's sizes, at N = 256 too."""
    rows: list[tuple[str, str, Work, Work]] = []
    for n in (32, 256):
        for dtype in ("float32", "bfloat16"):
            sizes = f"N {n}, K 65536, D 128, {dtype} bank"
            arguments = (n, 65536, 128, dtype)
            rows.append(("infonce", sizes, infonce(*arguments), infonce_eager(*arguments)))
    for stages, n, d in ((4, 32, 2048), (4, 256, 2048), (1, 64, 8192)):
        shape = (stages, n, d, "float32")
        rows.append(("crosscorr", f"{stages} x (N {n}, D {d})", crosscorr(*shape), crosscorr_eager(*shape)))
    for n in (32, 256):
        parts = [(n, channels, side, grid, "bfloat16") for channels, side, grid in STAGES]
        ours, eager = (sum_of([form(*part) for part in parts]) for form in (pooled_mse, pooled_mse_eager))
        rows.append(("pooled_mse", f"N {n}, four stages at 224 px, bfloat16", ours, eager))
    shapes = resnet50_shapes(128)
    numbers, tensors = sum(int(np.prod(shape)) for shape in shapes), len(shapes)
    rows.append(("ema", f"{numbers / 1e6:.1f} M parameters", ema(numbers, tensors), ema_eager(numbers, tensors)))
    sizes = f"{numbers / 1e6:.1f} M parameters (eager: SGD(fused=True), foreach)"
    rows.append(("sgd_ema", sizes, sgd_ema(numbers, tensors), sgd_ema_library(numbers, tensors)))
    push = queue_push(256, 128)
    rows.append(("queue_push", "N 256, D 128", push, replace(push, launches=6)))
    return rows


def sum_of(works: list[Work]) -> Work:
    """Works done one after the other, all in one dtype."""
    first = works[0]
    return replace(
        first,
        bytes=sum(work.bytes for work in works),
        flops=sum(work.flops for work in works),
        exponentials=sum(work.exponentials for work in works),
        launches=sum(work.launches for work in works),
    )


def table(machine: Machine) -> str:
    """The Markdown table of `entries`, each with its floor and prediction on `machine`."""
    lines = [
        "| operation | sizes | MB | GFLOP | floor µs | bound by | predicted µs | eager MB | eager predicted µs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, sizes, work, eager in entries():
        floor, bound = machine.floor(work)
        numbers = [f"{work.bytes / 1e6:.1f}", f"{work.flops / 1e9:.3g}", f"{floor * 1e6:.1f}", bound]
        numbers += [f"{machine.predicted(work) * 1e6:.0f}", f"{eager.bytes / 1e6:.0f}"]
        lines.append(f"| {name} | {sizes} | {' | '.join(numbers)} | {machine.predicted(eager) * 1e6:.0f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure the shares here; or print the predictions, and put them where a document's markers are."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument("--predicted", action="store_true", help="print what is predicted of an H100; measure nothing")
    parser.add_argument("--write", type=Path, help="document whose predictions are to be replaced: docs/kernels.md")
    args = parser.parse_args(argv)
    if not args.predicted and args.write is None:
        # Here, as the benchmarks that are run import this module.
        from bench.shares import report

        return report()
    print(table(H100))
    if args.write is not None:
        before, rest = args.write.read_text().split(BEGIN)
        write_text(args.write, f"{before}{BEGIN}\n{table(H100)}\n{END}{rest.split(END)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
