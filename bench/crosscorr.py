"""How fast are the cross-correlation loss and both its gradients, standardisation included, and in how much memory?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness, roofline
from bench.harness import Benchmark, Case, Missing, Outputs, Run
from bench.roofline import Work
from fastmoco.ops import definitions
from fastmoco.ops.crosscorr import crosscorr


@dataclass(frozen=True)
class Inputs:
    """Two (S, N, D) stacks of projections that require gradients, and the weight off the diagonal."""

    z1: Tensor
    z2: Tensor
    off_diagonal: float


def case(stages: int, n: int, d: int, off_diagonal: float, dtype: str = "float32") -> Case:
    return Case({"stages": stages, "N": n, "D": d, "off_diagonal": off_diagonal}, dtype)


def prepare(case: Case, device: str) -> Inputs:
    stages, n, d, off_diagonal = case.sizes.values()
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(stages, n, d, generator=generator)
    # Two views of one image are related; unrelated ones would leave the diagonal's part of the gradient untested.
    z2 = z1 + torch.randn(stages, n, d, generator=generator)
    z1, z2 = (z.to(device, getattr(torch, case.dtype)).requires_grad_() for z in (z1, z2))
    return Inputs(z1, z2, off_diagonal)


def outputs(loss: Tensor, z1: Tensor, z2: Tensor) -> Outputs:
    dz1, dz2 = torch.autograd.grad(loss, [z1, z2])
    return {"loss": loss.detach(), "dz1": dz1, "dz2": dz2}


def stage_by_stage(loss: Callable[[Tensor, Tensor], Tensor], z1: Tensor, z2: Tensor) -> Tensor:
    """The sum of `loss` over the stages, which have a loop but no batch in these forms."""
    return torch.stack([loss(a, b) for a, b in zip(z1, z2, strict=True)]).sum()


def oracle(x: Inputs) -> Outputs:
    z1, z2 = (z.detach().double().requires_grad_() for z in (x.z1, x.z2))
    loss = stage_by_stage(lambda a, b: definitions.crosscorr(a, b, off_diagonal=x.off_diagonal), z1, z2)
    return outputs(loss, z1, z2)


def work(case: Case) -> Work:
    stages, n, d, _ = case.sizes.values()
    return roofline.crosscorr(stages, n, d, case.dtype)


BENCH = Benchmark(
    op="crosscorr",
    baseline="paper, eager",
    cases=[
        *(case(1, n, d, lam) for n, d in ((32, 2048), (64, 2048), (256, 2048), (64, 8192)) for lam in (1.0, 0.005)),
        case(4, 32, 2048, 1.0),
        case(4, 32, 2048, 1.0, "bfloat16"),
    ],
    quick=[case(1, 32, 512, 1.0), case(1, 512, 256, 0.005), case(4, 32, 512, 1.0, "bfloat16")],
    headline=[case(4, 32, 2048, 1.0), case(1, 256, 2048, 0.005), case(1, 64, 8192, 0.005)],
    prepare=prepare,
    oracle=oracle,
    work=work,
)


@BENCH.provider("paper, eager")
def paper(x: Inputs) -> Run:
    """The published form: BatchNorm without affine, C, the diagonal and the rest of it."""

    def loss(a: Tensor, b: Tensor) -> Tensor:
        c = F.batch_norm(a, None, None, training=True).T @ F.batch_norm(b, None, None, training=True)
        c = c.div_(len(a))
        d = len(c)
        on = (c.diagonal() - 1).square().sum()
        off = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten().square().sum()
        return on + x.off_diagonal * off

    # In bfloat16 its C would be off by more than any tolerance; the conversion is its own.
    return lambda: outputs(stage_by_stage(loss, x.z1.float(), x.z2.float()), x.z1, x.z2)


@BENCH.provider("lightly BarlowTwinsLoss")
def lightly(x: Inputs) -> Run:
    try:
        from lightly.loss import BarlowTwinsLoss
    except ModuleNotFoundError as error:
        raise Missing("lightly is not installed") from error
    criterion = BarlowTwinsLoss(lambda_param=x.off_diagonal)
    return lambda: outputs(stage_by_stage(criterion, x.z1.float(), x.z2.float()), x.z1, x.z2)


def ours(x: Inputs, implementation: str) -> Run:
    def run() -> Outputs:
        losses = crosscorr(x.z1, x.z2, off_diagonal=x.off_diagonal, implementation=implementation)
        return outputs(losses.sum(), x.z1, x.z2)

    return run


BENCH.ours(ours, like=lambda x: x.z1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; status 1 where a provider failed."""
    return harness.main([BENCH], "crosscorr", str(__doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
