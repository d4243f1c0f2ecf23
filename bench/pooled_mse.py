"""How fast are the pooled mean squared error of two feature maps and its gradient, and in how much memory?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, mse_loss

from bench import harness, roofline
from bench.harness import Benchmark, Case, Outputs, Run
from bench.roofline import Work
from bench.shapes import STAGES
from fastmoco.ops import definitions
from fastmoco.ops.pooled_mse import pooled_mse


@dataclass(frozen=True)
class Inputs:
    """The query's map, which requires a gradient, and the key's, both (N, C, H, W) in channels-last format."""

    a: Tensor
    b: Tensor
    grid: int


def case(n: int, channels: int, side: int, grid: int, dtype: str = "bfloat16") -> Case:
    return Case({"N": n, "C": channels, "side": side, "grid": grid}, dtype)


def prepare(case: Case, device: str) -> Inputs:
    n, channels, side, grid = case.sizes.values()
    generator = torch.Generator().manual_seed(0)
    a, b = (
        # In memory as (N, H, W, C): channels-last.
        torch.randn(n, side, side, channels, generator=generator).to(device, getattr(torch, case.dtype))
        for _ in range(2)
    )
    return Inputs(a.permute(0, 3, 1, 2).requires_grad_(), b.permute(0, 3, 1, 2), grid)


def outputs(loss: Tensor, a: Tensor) -> Outputs:
    return {"loss": loss.detach(), "da": torch.autograd.grad(loss, a)[0]}


def oracle(x: Inputs) -> Outputs:
    a = x.a.detach().double().requires_grad_()
    return outputs(definitions.pooled_mse(a, x.b.double(), grid=x.grid), a)


def work(case: Case) -> Work:
    n, channels, side, grid = case.sizes.values()
    return roofline.pooled_mse(n, channels, side, grid, case.dtype)


BENCH = Benchmark(
    op="pooled_mse",
    baseline="paper, eager",
    cases=[*(case(32, *stage) for stage in STAGES), case(32, *STAGES[0], "float32"), case(32, 256, 64, 16)],
    quick=[case(4, 64, 28, 16), case(4, 128, 7, 4), case(4, 64, 32, 16, "float32")],
    headline=[case(32, *STAGES[0]), case(32, *STAGES[0], "float32"), case(32, *STAGES[3])],
    prepare=prepare,
    oracle=oracle,
    work=work,
)


@BENCH.provider("paper, eager")
def paper(x: Inputs) -> Run:
    """The published form: both maps pooled, then their mean squared error."""
    return lambda: outputs(mse_loss(adaptive_avg_pool2d(x.a, x.grid), adaptive_avg_pool2d(x.b, x.grid)), x.a)


def ours(x: Inputs, implementation: str) -> Run:
    return lambda: outputs(pooled_mse(x.a, x.b, grid=x.grid, implementation=implementation), x.a)


BENCH.ours(ours, like=lambda x: x.a)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; status 1 where a provider failed."""
    return harness.main([BENCH], "pooled_mse", str(__doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
