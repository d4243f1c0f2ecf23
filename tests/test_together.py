"""Two pieces of work at once: what each has of the thread that asks, and what becomes of it afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastmoco.distributed.world import World
from fastmoco.together import _openmp, together
from fastmoco.train import objective
from fastmoco.train.objective import MomentumContrast
from fastmoco.train.recipes import find
from runs import shared_batch, shared_trainer

Seen = tuple[str, int, bool, bool, torch.dtype]


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def look() -> Seen:
    return (
        threading.current_thread().name,
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    )


needs_openmp = pytest.mark.skipif(_openmp() is None, reason="torch's OpenMP library is not GNU's")


@needs_openmp
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_each_has_half_of_the_threads_and_the_modes_of_the_caller(gradients: bool, autocast: bool) -> None:
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        here, there = together(look, look)
        dtype = torch.get_autocast_dtype("cpu")
    own = threading.current_thread().name
    assert here == (own, 2, gradients, autocast, dtype)
    assert there[0] != own and there[1:] == (1, gradients, autocast, dtype)
    assert torch.get_num_threads() == 3


@needs_openmp
def test_both_are_at_work_at_once() -> None:
    meet = threading.Barrier(2, timeout=30)
    together(meet.wait, meet.wait)


def test_with_one_thread_they_run_one_after_the_other() -> None:
    torch.set_num_threads(1)
    order: list[str] = []
    assert together(lambda: order.append("here"), lambda: order.append("there")) == (None, None)
    assert order == ["here", "there"]
    assert together(look, look)[1][0] == threading.current_thread().name


def test_without_the_library_they_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmoco.together._openmp", lambda: None)
    assert together(look, look)[1] == look()


def fail() -> None:
    raise ValueError("here")


def fail_there() -> None:
    raise KeyError("there")


@pytest.mark.parametrize(
    ("here", "there", "error"), [(fail, look, ValueError), (look, fail_there, KeyError), (fail, fail_there, ValueError)]
)
def test_what_either_raises_is_raised_and_the_threads_are_given_back(
    here: Callable[[], object], there: Callable[[], object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        together(here, there)
    assert torch.get_num_threads() == 3
    assert together(lambda: 1, lambda: 2) == (1, 2)


@needs_openmp
def test_where_one_fails_the_other_has_ended() -> None:
    go, ended = threading.Event(), threading.Event()

    def slow() -> None:
        go.wait(30)
        ended.set()

    def hasty() -> None:
        threading.Timer(0.2, go.set).start()
        raise ValueError

    with pytest.raises(ValueError):
        together(hasty, slow)
    assert ended.is_set()


@needs_openmp
def test_a_forked_process_has_a_thread_of_its_own() -> None:
    together(look, look)
    child = os.fork()
    if child == 0:
        try:
            # What hangs is killed.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            # Without tensors: OpenMP's threads do not outlive a fork.
            os._exit(0 if together(lambda: 1, lambda: 2) == (1, 2) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_openmp
def test_within_the_other_thread_it_is_one_after_the_other() -> None:
    torch.set_num_threads(4)
    assert together(lambda: 0, lambda: together(look, look))[1][1][0].startswith("together")


@needs_openmp
@pytest.mark.parametrize("update", ["fused", "torch"])
def test_which_is_first_makes_no_difference_to_a_step_in_bfloat16(update: str) -> None:
    """Both ways of a symmetric loss go through the same weights, which autocast rounds, with copies or without."""
    torch.set_num_threads(2)
    found = []
    # Which encoder is late, on the first way and on the second.
    for late in (("query", "key"), ("key", "query")):
        settings = {"method": "moco", "precision": "bf16", "symmetric": True, "update": update}
        trainer = shared_trainer(World(), **settings)
        for name in ("query", "key"):
            ways = cycle([name == one for one in late])
            first = getattr(trainer.module, name).backbone.conv1
            first.register_forward_pre_hook(lambda *_, ways=ways: time.sleep(0.1 * next(ways)))
        for seed in range(2):
            trainer.step([shared_batch(World(), seed)], lr=0.05)
        found.append(trainer.engine.state())
    assert found[0].keys() == found[1].keys() and len(found[0]) > 50
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@needs_openmp
def test_a_profiler_sees_both_encoders() -> None:
    torch.set_num_threads(2)
    config = find("mocov2")(Path(), Path())
    module = MomentumContrast(replace(config.model, arch="resnet18"), config.loss, seed=0)
    views = [torch.rand(2, 3, 32, 32) for _ in range(2)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        module(*views, torch.zeros(8, config.model.dim))
    convolutions = sum(event.count for event in seen.key_averages() if event.key == "aten::conv2d")
    products = sum(event.count for event in seen.key_averages() if event.key == "fastmoco::unfold")
    alone = sum(isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1) for part in module.query.modules())
    assert convolutions + products >= 2 * alone


def losses_and_gradients(module: MomentumContrast, views: list[Tensor], bank: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    output = module(*views, bank)
    torch.stack(list(output.losses.values())).sum().backward()
    found = {name: loss.detach() for name, loss in output.losses.items()} | {"key": output.key, "query": output.query}
    found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in module.named_buffers()}


@needs_openmp
@pytest.mark.parametrize("symmetric", [False, True])
def test_momentum_contrast_is_to_the_bit_what_it_is_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool
) -> None:
    """Of one thread each, so that no sum is parted otherwise."""
    config = find("histology-mse")(Path(), Path())
    loss = replace(config.loss, symmetric=symmetric)
    views = [torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    bank = torch.nn.functional.normalize(torch.randn(64, config.model.dim, generator=torch.Generator().manual_seed(2)))
    used: list[int] = []

    def counted(here: Callable[[], object], there: Callable[[], object]) -> tuple[object, object]:
        used.append(1)
        return together(here, there)

    monkeypatch.setattr(objective, "together", counted)
    found = {}
    for threads in (1, 2):
        module = MomentumContrast(replace(config.model, arch="resnet18"), loss, seed=0)
        monkeypatch.setattr(module, "_both", partial(with_threads, threads, module._both))
        # The losses and the backward are by one thread in both.
        torch.set_num_threads(1)
        found[threads] = losses_and_gradients(module, views, bank)
    assert len(used) == 2 * (2 if symmetric else 1)
    assert found[1].keys() == found[2].keys()
    for name, value in found[1].items():
        assert torch.equal(value, found[2][name]), name


def with_threads(count: int, run: Callable[..., object], *args: Tensor) -> object:
    torch.set_num_threads(count)
    try:
        return run(*args)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("many", ["images", "processes"])
def test_large_views_and_shared_steps_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch, many: str) -> None:
    monkeypatch.setattr(objective, "together", lambda here, there: pytest.fail("at once"))
    if many == "images":
        monkeypatch.setattr(objective, "SMALL", 2 * 3 * 32 * 32 - 1)
    config = find("mocov2")(Path(), Path())
    module = MomentumContrast(replace(config.model, arch="resnet18"), config.loss, seed=0)
    module.alone = many == "images"
    output = module(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32), torch.zeros(8, config.model.dim))
    assert output.key.shape == (2, config.model.dim)


def test_only_a_run_of_one_process_has_both_at_once() -> None:
    config = find("mocov2")(Path(), Path())
    for size in (1, 2):
        world = World(rank=0, size=size)
        module = MomentumContrast(
            replace(config.model, arch="resnet18", norm="frozen"), config.loss, seed=0, world=world
        )
        assert module.alone == (size == 1)
