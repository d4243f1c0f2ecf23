"""How fast is the moving average over ResNet-50's weights, by itself and with the SGD step before it?"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import harness, roofline
from bench.harness import Benchmark, Case, Outputs, Run
from bench.shapes import resnet50_shapes
from fastmoco.ops.ema import ema_update_
from fastmoco.ops.sgd_ema import sgd_ema_update_

# Near float32's rounding: weight decay alone moves a weight by 3e-6 of itself.
TOLERANCE = {"float32": 1e-6}
MOMENTUM, LR, SGD_MOMENTUM, WEIGHT_DECAY = 0.999, 0.03, 0.9, 1e-4


@dataclass(frozen=True)
class Inputs:
    """Parameters with their gradients, momentum buffers at zero, and the averages, all float32."""

    parameters: list[Tensor]
    buffers: list[Tensor]
    targets: list[Tensor]

    @property
    def gradients(self) -> list[Tensor]:
        gradients = [p.grad for p in self.parameters]
        assert all(g is not None for g in gradients)
        return [g for g in gradients if g is not None]


def case(tensors: int | None = None) -> Case:
    shapes = resnet50_shapes(128)[:tensors]
    return Case({"parameters": sum(math.prod(shape) for shape in shapes), "tensors": len(shapes)})


def prepare(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    parameters, targets = [], []
    for shape in resnet50_shapes(128)[: case.sizes["tensors"]]:
        weight, gradient, target = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
        weight.grad = gradient
        parameters.append(weight)
        targets.append(target)
    return Inputs(parameters, [torch.zeros_like(p) for p in parameters], targets)


def averaged(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
    pairs = zip(targets, sources, strict=True)
    return [MOMENTUM * target.double() + (1 - MOMENTUM) * source.double() for target, source in pairs]


def ema_oracle(x: Inputs) -> Outputs:
    return {"targets": averaged(x.targets, x.parameters)}


def step_oracle(x: Inputs) -> Outputs:
    # The first step's momentum is the gradient itself, weight decay included.
    pairs = zip(x.gradients, x.parameters, strict=True)
    buffers = [gradient.double() + WEIGHT_DECAY * weight.double() for gradient, weight in pairs]
    weights = [weight.double() - LR * buffer for weight, buffer in zip(x.parameters, buffers, strict=True)]
    return {"parameters": weights, "targets": averaged(x.targets, weights)}


EMA = Benchmark(
    op="ema",
    baseline="paper, a loop",
    cases=[case()],
    quick=[case(tensors=40)],
    headline=[case()],
    prepare=prepare,
    oracle=ema_oracle,
    work=lambda case: roofline.ema(*case.sizes.values()),
    tolerance=TOLERANCE,
)


def loop(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """The published form, parameter by parameter."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(MOMENTUM * target + (1 - MOMENTUM) * source)


def ema_run(x: Inputs, update: Callable[[], None]) -> Run:
    def run() -> Outputs:
        update()
        return {"targets": x.targets}

    return run


@EMA.provider("paper, a loop")
def paper(x: Inputs) -> Run:
    return ema_run(x, lambda: loop(x.targets, x.parameters))


@EMA.provider("torch._foreach_lerp_")
def foreach(x: Inputs) -> Run:
    return ema_run(x, lambda: torch._foreach_lerp_(x.targets, x.parameters, 1 - MOMENTUM))


def ours(x: Inputs, implementation: str) -> Run:
    return ema_run(x, lambda: ema_update_(x.targets, x.parameters, MOMENTUM, implementation=implementation))


EMA.ours(ours, like=lambda x: x.targets[0])

STEP = Benchmark(
    op="sgd_ema",
    baseline="paper, SGD and a loop",
    cases=EMA.cases,
    quick=EMA.quick,
    headline=EMA.headline,
    prepare=prepare,
    oracle=step_oracle,
    work=lambda case: roofline.sgd_ema(*case.sizes.values()),
    tolerance=TOLERANCE,
)


def step_run(x: Inputs, update: Callable[[], None]) -> Run:
    def run() -> Outputs:
        update()
        return {"parameters": x.parameters, "targets": x.targets}

    return run


def library(x: Inputs, average: Callable[[Sequence[Tensor], Sequence[Tensor]], None], **form: bool) -> Run:
    """torch's SGD, in one of its forms, then `average`."""
    optimizer = torch.optim.SGD(x.parameters, lr=LR, momentum=SGD_MOMENTUM, weight_decay=WEIGHT_DECAY, **form)

    def update() -> None:
        optimizer.step()
        average(x.targets, x.parameters)

    return step_run(x, update)


def lerp(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    torch._foreach_lerp_(list(targets), list(sources), 1 - MOMENTUM)


# Without a word on its form torch takes the loop on a CPU and foreach on CUDA, as the paper's code has it.
STEP.provider("paper, SGD and a loop")(lambda x: library(x, loop))
STEP.provider("SGD(foreach), foreach")(lambda x: library(x, lerp, foreach=True))
STEP.provider("SGD(fused), foreach")(lambda x: library(x, lerp, fused=True))


def ours_together(x: Inputs, implementation: str) -> Run:
    def update() -> None:
        sgd_ema_update_(
            x.parameters,
            x.gradients,
            x.buffers,
            x.targets,
            lr=LR,
            momentum=SGD_MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            ema=MOMENTUM,
            implementation=implementation,
        )

    return step_run(x, update)


STEP.ours(ours_together, like=lambda x: x.targets[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run both benchmarks; status 1 where a provider failed."""
    return harness.main([EMA, STEP], "ema", str(__doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
