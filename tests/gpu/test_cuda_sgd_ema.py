"""SGD's step and the moving average in one pass, on a GPU: against both in float64, and in a CUDA graph."""

import pytest
import torch
from torch import Tensor

from cuda_checks import DEVICE, assert_near, assert_same_bits, no_synchronisation, randn, replay
from fastmoco.ops.sgd_ema import sgd_ema_update_

pytestmark = pytest.mark.gpu
OPERATION = "sgd_ema"

SHAPES = [(0,), (), (3,), (127,), (129,), (1025,), (64, 3, 7, 7), (1031, 1033)]
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "ema": 0.99}
# A projector's weights have no average.
WITHOUT_TARGET = 3


class State:
    """Parameters, gradients, momentum and averages, and the same as single float64 rows."""

    def __init__(self) -> None:
        self.parameters, self.gradients, self.targets = ([randn(*shape) for shape in SHAPES] for _ in range(3))
        self.buffers = [torch.zeros_like(p) for p in self.parameters]
        self.p, self.g, self.b, self.k = (row(x) for x in (self.parameters, self.gradients, self.buffers, self.targets))

    def step(self, implementation: str, **options: object) -> None:
        targets = [None if i == WITHOUT_TARGET else target for i, target in enumerate(self.targets)]
        everything = (self.parameters, self.gradients, self.buffers, targets)
        sgd_ema_update_(*everything, implementation=implementation, **(OPTIONS | options))

    def exact_step(self, *, blocked: bool = False) -> None:
        if not blocked:
            self.b = 0.9 * self.b + self.g + 0.01 * self.p
            self.p = self.p - 0.1 * self.b
        averaged = 0.99 * self.k + 0.01 * self.p
        sizes = [p.numel() for p in self.parameters]
        kept = slice(sum(sizes[:WITHOUT_TARGET]), sum(sizes[: WITHOUT_TARGET + 1]))
        averaged[kept] = self.k[kept]
        self.k = averaged

    def check(self) -> None:
        for name in ("parameters", "buffers", "targets"):
            exact = {"parameters": self.p, "buffers": self.b, "targets": self.k}[name]
            assert_near(row(getattr(self, name)), exact, 1e-6, name)


def row(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def test_three_steps_are_sgd_and_the_average(implementation: str) -> None:
    state = State()
    for _ in range(3):
        state.step(implementation)
        state.exact_step()
    state.check()


def test_where_infinities_were_found_only_the_averages_move(implementation: str) -> None:
    state = State()
    state.step(implementation, found_inf=torch.ones((), device=DEVICE))
    state.exact_step(blocked=True)
    state.check()
    state.step(implementation, found_inf=torch.zeros((), device=DEVICE))
    state.exact_step()
    state.check()


def test_a_graph_replays_it(implementation: str) -> None:
    State().step(implementation)  # what compiles or allocates once must not do so while it is captured
    state = State()
    replay(lambda: state.step(implementation), times=3)
    for _ in range(3):
        state.exact_step()
    state.check()


def test_the_bits_are_the_same_every_time(implementation: str) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(1)
        state = State()
        state.step(implementation)
        return [*state.parameters, *state.buffers, *state.targets]

    assert_same_bits(run)


def test_the_host_does_not_wait(implementation: str) -> None:
    state = State()
    state.step(implementation)
    with no_synchronisation():
        state.step(implementation)
