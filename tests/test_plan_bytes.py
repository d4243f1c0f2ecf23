"""The bytes that the plan foretells, against those that the interfaces of hosts on a bridge count."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bridge import Bridge, counted
from fastmoco.data.loader import Batch
from fastmoco.distributed.world import World
from fastmoco.plan.counts import count
from fastmoco.plan.traffic import Flow, flows
from fastmoco.train.config import Config
from fastmoco.train.trainer import Trainer
from runs import small_config
from worlds import in_world

pytestmark = pytest.mark.system

TOLERANCE = 0.05
SIZE, ROWS, STEPS, REPEATS = 64, 6, 2, 3

Reading = tuple[int, Counter[str]]


def reading(world: World) -> Reading:
    """What this process's interface has sent, once nothing is on its way, and what the process counted."""
    dist.barrier(world.control)
    time.sleep(0.3)
    return counted()[0], Counter(world.sent)


def readings(steps: Callable[[int], None], world: World) -> list[Reading]:
    """Before, and then REPEATS times after STEPS steps and after twice as many."""
    found = [reading(world)]
    for times in (STEPS, 2 * STEPS) * REPEATS:
        steps(times)
        found.append(reading(world))
    return found


def per_step(found: list[Reading]) -> tuple[float, dict[str, float]]:
    """Bytes of one step: twice STEPS less STEPS takes off the cost of reading, the median what TCP sent again."""
    pairs = [found[i : i + 3] for i in range(0, len(found) - 1, 2)]
    sent = statistics.median((c - 2 * b + a) / STEPS for (a, _), (b, _), (c, _) in pairs)
    (_, said_a), (_, said_b), (_, said_c) = pairs[0]
    return sent, {kind: (said_c[kind] - 2 * said_b[kind] + said_a[kind]) / STEPS for kind in said_c}


def train(world: World, config: Config) -> list[Reading]:
    torch.manual_seed(0)
    trainer = Trainer(config, precision=config.run.precision, world=world)
    rows = config.optim.batch_size // world.size
    view = torch.rand(rows, 3, SIZE, SIZE).half().to(memory_format=torch.channels_last)

    def steps(times: int) -> None:
        for _ in range(times):
            batches = [Batch(view, view.flip(3), np.arange(rows)) for _ in range(config.optim.accumulate)]
            trainer.step(batches, lr=1e-3)

    # The first steps find out in which order gradients come.
    steps(2)
    return readings(steps, world)


def foretold(config: Config, world: int) -> list[Flow]:
    precision, optim, run = config.run.precision, config.optim, config.run
    rows = optim.batch_size // world
    counts = count(config.model, config.loss, size=SIZE, rows=rows, precision=precision)
    zero = 1 if run.zero is None else run.zero
    through = precision == "bf16" and optim.accumulate == 1 and optim.update == "fused"
    return flows(
        counts, config.model, config.loss, size=SIZE, world=world, precision=precision, accumulate=optim.accumulate,
        through_copies=through, engine="deepspeed" if run.engine == "deepspeed" else "ddp", zero=zero,
    )  # fmt: skip


def run_of(method: str, world: int, **changes: Any) -> Config:
    base = {"batch_size": ROWS * world, "queue_size": 64, "size": SIZE, "log_every": 99}
    return small_config(Path(), Path(), method=method, **base | changes)


def compare(config: Config, world: int) -> None:
    planned = foretold(config, world)
    expected = sum(flow.on_interface(world, "gloo") for flow in planned)
    with Bridge(world) as bridge:
        results = [per_step(found) for found in in_world(world, train, config, timeout=300, bridge=bridge)]
    by_kind: Counter[str] = Counter()
    for flow in planned:
        by_kind[flow.kind] += flow.sent(world)  # type: ignore[assignment]
    for rank, (sent, said) in enumerate(results):
        payload = sum(said.values())
        print(f"W {world} rank {rank}: interface {sent:,.0f}, plan {expected:,.0f} ({sent / expected - 1:+.2%}), "
              f"counted {payload:,.0f} {said} plan {dict(by_kind)}")  # fmt: skip
    for sent, said in results:
        assert sent == pytest.approx(expected, rel=TOLERANCE)
        # What DeepSpeed sends by itself, this process does not see.
        unseen = {"control", "gradients", "weights"} if config.run.engine == "deepspeed" else {"control"}
        for kind in (said.keys() | by_kind.keys()) - unseen:
            assert said[kind] == pytest.approx(by_kind[kind], rel=1e-3), kind


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("moco", {}),
        ("mse", {"norm": "sync"}),
        ("barlow", {"barlow_correlation": "global", "precision": "bf16"}),
    ],
)
def test_the_interface_counts_what_the_plan_says(method: str, changes: dict[str, Any], world: int) -> None:
    compare(run_of(method, world, **{"key_shuffle": "global"} | changes), world)


# Under CI nothing is passed over.
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None and not os.environ.get("CI"), reason="no DeepSpeed here"
)
@pytest.mark.parametrize(
    ("zero", "world", "changes"),
    [(1, 2, {"precision": "bf16"}), (3, 3, {"precision": "bf16"})],
)
def test_zero_sends_what_the_plan_says(zero: int, world: int, changes: dict[str, Any]) -> None:
    compare(run_of("moco", world, engine="deepspeed", zero=zero, **changes), world)


SUMS = {"sum": 300_000, "scatter": 300_000, "gather": 100_000, "collection": 300_000, "exchange": 300_000}


def collectives(world: World) -> dict[str, float]:
    """Bytes on the interface of each kind of collective, of as many bytes as SUMS has float32 numbers times 4."""
    found = {}
    for kind, n in SUMS.items():
        whole, part = torch.zeros(n), torch.zeros(n // world.size)

        def call(kind: str = kind, whole: torch.Tensor = whole, part: torch.Tensor = part) -> None:
            if kind == "sum":
                dist.all_reduce(whole)
            elif kind == "scatter":
                dist.reduce_scatter_tensor(part, whole)
            elif kind == "gather":
                dist.all_gather_into_tensor(torch.zeros(world.size * len(whole)), whole)
            elif kind == "collection":
                dist.all_gather_into_tensor(whole, part)
            else:
                dist.all_to_all_single(torch.empty_like(whole), whole)

        def calls(times: int, call: Callable[[], None] = call) -> None:
            for _ in range(times):
                call()

        calls(1)
        found[kind] = per_step(readings(calls, world))[0]
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_gloo_moves_of_each_collective_what_the_plan_says(world: int) -> None:
    with Bridge(world) as bridge:
        results = in_world(world, collectives, bridge=bridge)
    for kind, n in SUMS.items():
        flow = Flow(kind, kind, 4 * n, 1, "after")  # type: ignore[arg-type]
        expected = flow.on_interface(world, "gloo")
        for found in results:
            assert found[kind] == pytest.approx(expected, rel=TOLERANCE), kind
