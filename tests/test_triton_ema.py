"""The Triton average and its fusion with SGD against the references in float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.kernels import table as tables
from fastmoco.ops.ema import ema_update_
from fastmoco.ops.sgd_ema import sgd_ema_update_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Empty, a scalar, one below, at and above a block of 4096, a convolution, several blocks.
SHAPES = [(0,), (), (17,), (4095,), (4096,), (4097,), (6, 5, 3, 3), (3, 4099)]
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "ema": 0.9}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Tables are kept by address, and a table too many would hide one too old."""
    torch.manual_seed(21)
    tables._tables.clear()
    yield
    assert len(tables._tables) <= tables.KEPT


def random(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = [torch.randn(shape).to(dtype) for shape in SHAPES]
    made[6] = made[6].contiguous(memory_format=torch.channels_last)
    return [tensor.to(DEVICE) for tensor in made]


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def close(actual: list[Tensor], exact: list[Tensor], tolerance: float = 1e-6) -> None:
    for got, want in zip(actual, exact, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def shadowed(shadows: list[Tensor], targets: list[Tensor]) -> None:
    """Rounded to the nearest; the interpreter cuts off."""
    if DEVICE == "cuda":
        assert all(torch.equal(s, t.bfloat16()) for s, t in zip(shadows, targets, strict=True))
    else:
        close(shadows, targets, 2.0**-7)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_average_of_sources_in_any_dtype(dtype: torch.dtype, momentum: float) -> None:
    targets, sources = random(), random(dtype)
    shadows = [torch.full_like(target, math.nan, dtype=torch.bfloat16) for target in targets]
    before, exact = [target.clone() for target in targets], double(targets)
    ema_update_(targets, sources, momentum, shadows=shadows, implementation="triton")
    ema_update_(exact, double(sources), momentum, implementation="reference")
    close(targets, exact)
    shadowed(shadows, targets)
    if momentum == 1.0:
        assert all(torch.equal(target, old) for target, old in zip(targets, before, strict=True))
    if momentum == 0.0:
        assert all(torch.equal(target, source.float()) for target, source in zip(targets, sources, strict=True))


def test_what_the_kernel_does_not_know_is_averaged_all_the_same() -> None:
    """float64, gaps, two orders in memory, an address between the multiples of 16 bytes, sources of several dtypes."""
    memory = torch.randn(40, device=DEVICE)
    targets = [torch.randn(7, dtype=torch.float64, device=DEVICE), memory[:14:2], memory[21:30], *random()[5:7]]
    sources = [torch.randn_like(targets[0]), *(torch.randn(n, device=DEVICE) for n in (7, 9)), *random(torch.half)[5:7]]
    sources[-1] = sources[-1].contiguous()
    exact = double(targets)
    between = memory[1:14:2].clone()
    ema_update_(targets, sources, 0.75, implementation="triton")
    ema_update_(exact, double(sources), 0.75, implementation="reference")
    close(targets, exact)
    assert torch.equal(memory[1:14:2], between)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"momentum": 0.0}, {"momentum": 0.0, "weight_decay": 0.0, "ema": 0.3}, {"found_inf": 0.0}, {"found_inf": 1.0}],
    ids=str,
)
def test_sgd_and_average(dtype: torch.dtype, changes: dict[str, float]) -> None:
    options = OPTIONS | changes
    if "found_inf" in options:
        options["found_inf"] = torch.tensor(options["found_inf"], device=DEVICE)
    parameters, averages = random(), random()
    buffers = [torch.zeros_like(p) for p in parameters] if options["momentum"] else []
    targets: list[Tensor | None] = [*averages]
    targets[4] = targets[6] = None
    shadows = [None if t is None else torch.full_like(t, math.nan, dtype=torch.bfloat16) for t in targets]
    exact = [double(list_) for list_ in (parameters, buffers, averages)]
    exact_targets = [None if t is None else x for t, x in zip(targets, exact[2], strict=True)]
    before = [p.clone() for p in parameters]
    for _ in range(2):
        gradients = random(dtype)
        sgd_ema_update_(parameters, gradients, buffers, targets, **options, shadows=shadows, implementation="triton")
        sgd_ema_update_(exact[0], double(gradients), exact[1], exact_targets, **options, implementation="reference")
    for got, want in zip((parameters, buffers, averages), exact, strict=True):
        close(got, want)
    shadowed([s for s in shadows if s is not None], [t for t in targets if t is not None])
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True)) == (
        changes == {"found_inf": 1.0}
    )


def test_an_infinite_gradient_is_kept_out_while_blocked() -> None:
    p, b, k = (torch.ones(5, device=DEVICE) for _ in range(3))
    blocked = torch.ones((), device=DEVICE)
    g = torch.tensor([math.inf, math.nan, 0, 1, 2], device=DEVICE)
    sgd_ema_update_([p], [g], [b], [k], **OPTIONS, found_inf=blocked, implementation="triton")
    assert all(torch.equal(x, torch.ones_like(x)) for x in (p, b, k))


def test_tables_are_made_anew_where_memory_is_another() -> None:
    targets, sources = random(), random()
    for _ in range(3):
        ema_update_(targets, sources, 0.5, implementation="triton")
    assert len(tables._tables) == 1
    # The same addresses, and fewer elements: the one left out stays.
    last = targets[7].flatten()[-1].item()
    ema_update_([targets[7].flatten()[:-1]], [sources[7].flatten()[:-1]], 0.5, implementation="triton")
    ema_update_([targets[7].flatten()[:-2]], [sources[7].flatten()[:-2]], 0.5, implementation="triton")
    ema_update_([targets[7].flatten()[:-1]], [sources[7].flatten()[:-1]], 0.5, implementation="triton")
    assert targets[7].flatten()[-1].item() == last and len(tables._tables) == 3
    exact = double(targets)
    for _ in range(tables.KEPT + 3):
        sources = random()
        ema_update_(targets, sources, 0.5, implementation="triton")
        ema_update_(exact, double(sources), 0.5, implementation="reference")
    close(targets, exact)


def test_a_table_outlives_its_turn_once_a_graph_has_captured_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in the warm-up and found again by the capture; the graph reads its memory at every replay."""
    captured: set[tables.Table] = set()
    monkeypatch.setattr(tables, "_captured", captured)
    lists, forgotten = (random(), random()), (random(), random())
    kept, evicted = (weakref.ref(tables.table(each).memory) for each in (lists, forgotten))
    with monkeypatch.context() as capture:
        capture.setattr(tables, "_capturing", lambda device: True)
        assert all(tables.table(lists).memory is kept() for _ in range(2))
    others = [(random(), random()) for _ in range(tables.KEPT)]
    for other in others:
        tables.table(other)
    assert evicted() is None and kept() is not None and len(captured) == 1


if DEVICE == "cuda":

    def test_a_captured_graph_keeps_its_table() -> None:
        targets, sources = random(), random()
        exact = double(targets)
        ema_update_(random(), random(), 0.5, implementation="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ema_update_(targets, sources, 0.5, implementation="triton")
        for _ in range(3):
            graph.replay()
            ema_update_(exact, double(sources), 0.5, implementation="reference")
        close(targets, exact)
