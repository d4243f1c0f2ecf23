"""The ways from files to updated weights that `bench.e2e` compares: a training step, and the loader that feeds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench.example import Example, lightlys
from bench.loaders import LOADERS, Pair, Setting, fastmoco_loader
from bench.step import PLAIN, StepArgs, Variant, as_run, build, build_paper
from bench.turns import Missing, Turn, take_turn
from fastmoco.allocator import keep_freed_memory
from fastmoco.data.dali import dali_installed
from fastmoco.data.loader import Batch, default_workers

# A step that changes the weights, and so little that none of the ways runs into other numbers than another.
LR = 1e-4
# All of a step on a pair of views but the optimiser's part, or with the weights left as they are, which returns the
# loss; and a whole step.
Steps = tuple[Callable[[Pair], float], Callable[[Pair], object]]


def eager_steps(args: StepArgs) -> Steps:
    """The paper's, `bench.paper`: eager, float32, NCHW, torch's SGD."""
    trainer = build(args, PLAIN)
    paper, optim = build_paper(trainer), trainer.config.optim
    parameters = [p for module in (paper.query, *paper.projectors) for p in module.parameters()]
    sgd = torch.optim.SGD(parameters, lr=LR, momentum=optim.sgd_momentum, weight_decay=optim.weight_decay)

    def backward(pair: Pair) -> float:
        return paper.backward(*_wide(pair, args.device))["total"].item()

    def step(pair: Pair) -> None:
        backward(pair)
        sgd.step()

    return backward, step


def lightly_steps(args: StepArgs) -> Steps:
    """lightly's example, of the same weights, negatives and constants; its SGD has neither momentum nor weight decay.

    Raises Missing where lightly is not installed, and for a method with stage losses, which it has not.
    """
    trainer = build(args, PLAIN)
    loss = trainer.config.loss
    if loss.method != "moco":
        raise Missing(f"lightly's example has no stage losses, which --recipe {args.recipe} has")
    if trainer.config.model.head != "mlp":
        raise Missing(f"lightly's example has MoCo v2's head, which --recipe {args.recipe} has not")
    try:
        parts = lightlys()
    except ModuleNotFoundError:
        raise Missing("lightly is not installed") from None
    example = Example(
        args.arch,
        parts,
        bank=loss.queue_size,
        temperature=loss.temperature,
        momentum=loss.ema,
        lr=LR,
        device=args.device,
    )
    example.start_from(trainer)

    return (
        lambda pair: example.backward(*_wide(pair, args.device)).item(),
        lambda pair: example.step(*_wide(pair, args.device)),
    )


def fastmoco_steps(args: StepArgs) -> Steps:
    """fastmoco's, in the arithmetic that a run has."""
    trainer = build(args, as_run(args.device))
    if args.device == "cpu":
        # As a run does; each way has a process of its own.
        keep_freed_memory()

    def advance(pair: Pair, lr: float) -> float:
        q, k = (view.contiguous(memory_format=torch.channels_last) for view in pair)
        trainer.step([Batch(q, k, torch.arange(len(q)).numpy())], lr=lr)
        return trainer.history.read()[0]["loss"]

    return lambda pair: advance(pair, 0.0), lambda pair: advance(pair, LR)


def _wide(pair: Pair, device: str) -> Pair:
    """The views as float32 NCHW, which a loader of others' gives already."""
    q, k = (view.to(device, torch.float32).contiguous() for view in pair)
    return q, k


@dataclass(frozen=True)
class Way:
    """How the steps are made, the loader that feeds them, and their arithmetic on a device."""

    steps: Callable[[StepArgs], Steps]
    loader: str
    variant: Callable[[str], Variant] = lambda device: PLAIN


EAGER, LIGHTLY, OURS = "eager reference, torchvision PIL", "lightly's example", "fastmoco"
# For fairness: as EAGER is used, it loads slowly where a processor multiplies denormals slowly.
FLUSHED = "eager reference, denormals flushed"
WAYS = {
    EAGER: Way(eager_steps, "torchvision, PIL"),
    FLUSHED: Way(eager_steps, "torchvision, PIL, denormals flushed"),
    LIGHTLY: Way(lightly_steps, "lightly"),
    OURS: Way(fastmoco_steps, "fastmoco dali" if dali_installed() else "fastmoco pillow", as_run),
}


def workers_of(way: str, workers: int, device: str) -> int:
    """The threads or processes that load: ours has as many as a run that is not told, the others `workers`."""
    return default_workers(device) if way == OURS else workers


class Training:
    """A step fed by a loader, at work in its own process. Raises Missing where there is no such way here."""

    def __init__(self, way: str, args: StepArgs, setting: Setting) -> None:
        self._setting = replace(setting, workers=workers_of(way, setting.workers, setting.device))
        self._open = LOADERS[WAYS[way].loader]
        # The draws of torchvision's transforms, and of lightly's.
        torch.manual_seed(0)
        self._backward, self._step = WAYS[way].steps(args)

    def first_losses(self, count: int) -> list[float]:
        """The losses of the first of fastmoco's views by the weights that every way starts from, before any step.

        From the second on, the negatives have the keys of those before among them.
        """
        with fastmoco_loader("pillow")(self._setting) as items:
            return [self._backward(next(items)) for _ in range(count)]

    def turn(self, seconds: float) -> Turn:
        """One turn of about `seconds`, and a quarter as much before it."""

        def use(pair: Pair) -> int:
            self._step(pair)
            return len(pair[0])

        finish = torch.cuda.synchronize if self._setting.device != "cpu" else lambda: None
        burst = max(self._setting.workers, 1)
        return take_turn(
            self._open(self._setting), use, seconds=seconds, burst=burst, untimed=seconds / 4, finish=finish
        )
