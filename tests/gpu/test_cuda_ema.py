"""The moving average on a GPU: against the recurrence in float64, in a CUDA graph, without waiting."""

import math

import pytest
import torch
from torch import Tensor

from cuda_checks import assert_near, assert_peak_below, assert_same_bits, no_synchronisation, randn, replay
from fastmoco.ops.ema import ema_update_

pytestmark = pytest.mark.gpu
OPERATION = "ema"

# Empty, a scalar, primes, one around a vector and a block, a convolution, and one that many blocks share.
SHAPES = [(0,), (), (1,), (3,), (127,), (129,), (1023,), (1025,), (64, 3, 7, 7), (1031, 1033)]


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(*shape, dtype=dtype) for shape in SHAPES]


def numbers(values: list[Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in values])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.999, 1.0])
def test_it_is_the_recurrence(implementation: str, momentum: float, dtype: torch.dtype) -> None:
    targets, sources = tensors(dtype), tensors(dtype)
    want = momentum * numbers(targets) + (1 - momentum) * numbers(sources)
    ema_update_(targets, sources, momentum, implementation=implementation)
    assert_near(numbers(targets), want, torch.finfo(dtype).eps * 2, "targets")


def test_shadows_are_the_rounded_targets(implementation: str) -> None:
    targets, sources = tensors(), tensors()
    shadows = [torch.full_like(target, math.nan, dtype=torch.bfloat16) for target in targets]
    ema_update_(targets, sources, 0.9, shadows=shadows, implementation=implementation)
    assert all(torch.equal(shadow, target.bfloat16()) for shadow, target in zip(shadows, targets, strict=True))


def test_channels_last_and_strided_weights(implementation: str) -> None:
    target = randn(16, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    source, wide = randn(16, 8, 3, 3), randn(40)
    gaps = wide[::2]
    want = [0.5 * a.double() + 0.5 * b.double() for a, b in ((target, source), (gaps, torch.ones_like(gaps)))]
    kept = wide[1::2].clone()
    ema_update_([target, gaps], [source, torch.ones_like(gaps)], 0.5, implementation=implementation)
    for got, right in zip((target, gaps), want, strict=True):
        assert_near(got, right, 1e-6, "target")
    assert torch.equal(wide[1::2], kept) and target.is_contiguous(memory_format=torch.channels_last)


def test_the_bits_are_the_same_every_time(implementation: str) -> None:
    before, sources = tensors(), tensors()

    def run() -> list[Tensor]:
        targets = [target.clone() for target in before]
        ema_update_(targets, sources, 0.999, implementation=implementation)
        return targets

    assert_same_bits(run)


def test_more_tensors_than_one_launch_takes(implementation: str) -> None:
    targets, sources = ([randn(i % 37) for i in range(1000)] for _ in range(2))
    want = 0.9 * numbers(targets) + 0.1 * numbers(sources)
    ema_update_(targets, sources, 0.9, implementation=implementation)
    assert_near(numbers(targets), want, 1e-6, "targets")


def test_a_graph_replays_it(implementation: str) -> None:
    targets, sources = tensors(), tensors()
    # Warmed up on copies: what compiles or allocates once must not do so while it is captured.
    ema_update_([target.clone() for target in targets], sources, 0.9, implementation=implementation)
    want = numbers(targets)
    replay(lambda: ema_update_(targets, sources, 0.9, implementation=implementation), times=3)
    for _ in range(3):
        want = 0.9 * want + 0.1 * numbers(sources)
    assert_near(numbers(targets), want, 1e-6, "targets after three replays")


def test_a_graph_outlives_what_runs_after_it(implementation: str) -> None:
    """What the warm-up left for the capture must stay where it is, however many other calls want its place."""
    targets, sources = tensors(), tensors()
    want = numbers(targets)
    others = [(tensors(), tensors()) for _ in range(20)]

    def step() -> None:
        ema_update_(targets, sources, 0.9, implementation=implementation)

    def crowd() -> None:
        for other in others:
            ema_update_(*other, 0.9, implementation=implementation)

    replay(step, times=3, between=crowd)
    for _ in range(4):
        want = 0.9 * want + 0.1 * numbers(sources)
    assert_near(numbers(targets), want, 1e-6, "targets after one step and three replays")


def test_the_host_does_not_wait_and_nothing_large_is_made(implementation: str) -> None:
    targets, sources = tensors(), tensors()
    ema_update_(targets, sources, 0.999, implementation=implementation)
    with no_synchronisation():
        ema_update_(targets, sources, 0.999, implementation=implementation)
    total = sum(target.nbytes for target in targets)
    assert_peak_below(total // 4, lambda: ema_update_(targets, sources, 0.999, implementation=implementation))
